"""Data sheets of accelerators and links, as their vendors publish them."""

import dataclasses
from dataclasses import dataclass

GB = 1e9

# seconds per hop: the constants of NCCL's own tuning for rings ("Simple"), 2.30.7
NVLINK_HOP = 3.4e-6
PCIE_HOP = 5.7e-6
NETWORK_HOP = 14e-6

ETHERNET = 10e9 / 8  # bytes per second of 10 Gbit/s, assumed between machines of unknown network

GLOO_HOP = 130e-6  # seconds: gloo between two processes of a machine; between 104 and 155 us (docs/decisions.md)


@dataclass(frozen=True)
class Link:
    """What one rank can send, in one direction."""

    bandwidth: float  # bytes per second
    latency: float  # seconds per hop


@dataclass(frozen=True)
class Accelerator:
    """An accelerator and the vendor's own node of them, by the vendor's data sheets. All rates are peaks."""

    name: str
    memory: float  # bytes; 0: unknown
    peak: float  # FLOP/s of dense bfloat16 matrix products; 0: unknown
    memory_bandwidth: float  # bytes per second; infinite: the optimizer's update is assumed to take no time
    link: Link  # between two accelerators of one node
    network: Link  # between nodes: the share of one rank
    node: str  # the source of the network's figure
    per_node: int = 8
    overlap: float = 1.0  # share of the backward pass that messages overlap with; 0 if the same cores do both
    is_cpu: bool = False


def _nvidia(
    name: str,
    memory: float,
    peak: float,
    memory_bandwidth: float,
    link: float,
    network: float,
    node: str,
    nvlink: bool = True,
) -> Accelerator:
    """Convert from the units of the data sheets: GB, dense bfloat16 TFLOP/s, GB/s; both links in one direction."""
    return Accelerator(
        name=name,
        memory=memory * GB,
        peak=peak * 1e12,
        memory_bandwidth=memory_bandwidth * GB,
        link=Link(link * GB, NVLINK_HOP if nvlink else PCIE_HOP),
        network=Link(network * GB, NETWORK_HOP),
        node=node,
    )


# NVIDIA's data sheets of the accelerators and of its DGX systems. Where a sheet gives a rate "with sparsity" or a link
# in both directions, this table has half of it. There is no DGX of the PCIe cards, so their network is assumed.
ACCELERATORS = {
    "a100-40": _nvidia("NVIDIA A100 SXM 40 GB", 40, 312, 1555, 300, 25, "DGX A100: 200 Gbit/s each"),
    "a100": _nvidia("NVIDIA A100 SXM 80 GB", 80, 312, 2039, 300, 25, "DGX A100: 200 Gbit/s each"),
    "h100": _nvidia("NVIDIA H100 SXM", 80, 989, 3350, 450, 50, "DGX H100: 400 Gbit/s each"),
    "h200": _nvidia("NVIDIA H200 SXM", 141, 989, 4800, 450, 50, "DGX H200: 400 Gbit/s each"),
    "b200": _nvidia("NVIDIA B200 SXM", 180, 2250, 8000, 900, 50, "DGX B200: 400 Gbit/s each"),
    "l4": _nvidia("NVIDIA L4", 24, 121, 300, 32, 1.5625, "assumed: 100 Gbit/s for 8", nvlink=False),
    "l40s": _nvidia("NVIDIA L40S", 48, 362, 864, 32, 1.5625, "assumed: 100 Gbit/s for 8", nvlink=False),
}


def this_machine(memory: float, memory_bandwidth: float) -> Accelerator:
    """Return an `Accelerator` for machines like this one, one process each, on a network that is not known.

    memory: bytes. memory_bandwidth: bytes per second.
    """
    network = Link(ETHERNET, GLOO_HOP)
    return Accelerator(
        name="a CPU like this one",
        memory=memory,
        peak=0.0,
        memory_bandwidth=memory_bandwidth,
        link=network,
        network=network,
        node="assumed: 10 Gbit/s each",
        per_node=1,
        overlap=0.0,
        is_cpu=True,
    )


def describe_link(link: Link) -> str:
    """Return '450 GB/s and 3.4 us a hop'."""
    return f"{link.bandwidth / GB:g} GB/s and {link.latency * 1e6:g} us a hop"


def with_links(
    accelerator: Accelerator,
    bandwidth: float | None = None,
    network_bandwidth: float | None = None,
    per_node: int | None = None,
) -> Accelerator:
    """Return the accelerator with the user's own figures where given.

    Bandwidths are GB/s of a rank in one direction. per_node: ranks of a node.
    """
    if bandwidth is not None:
        link = Link(bandwidth * GB, accelerator.link.latency)
        accelerator = dataclasses.replace(accelerator, link=link)
    if network_bandwidth is not None:
        network = Link(network_bandwidth * GB, accelerator.network.latency)
        accelerator = dataclasses.replace(accelerator, network=network, node="given")
    if per_node is not None:
        accelerator = dataclasses.replace(accelerator, per_node=per_node)
    return accelerator
