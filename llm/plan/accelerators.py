"""Data sheets of accelerators and links, as their vendors state them."""

from dataclasses import dataclass

GB = 1e9


NVLINK_HOP, PCIE_HOP, NETWORK_HOP = 3.4e-6, 5.7e-6, 14e-6  # seconds: NCCL's own constants for rings ("Simple"), 2.30.7


ETHERNET = 10e9 / 8  # bytes a second of 10 Gbit/s, assumed between machines of which nothing is known


GLOO_HOP = 130e-6  # seconds: gloo between two processes of one machine, the middle of 104 and 155 us (docs/plan.md)


@dataclass(frozen=True)
class Link:
    """What one rank can send, in one direction."""

    bandwidth: float  # bytes a second
    latency: float  # seconds of a hop


@dataclass(frozen=True)
class Accelerator:
    """What its vendor's data sheets say of it and of the vendor's own node of them, all of it peaks."""

    name: str
    memory: float  # bytes; 0: not known
    peak: float  # FLOP/s of dense bfloat16 products; 0: not known
    memory_bandwidth: float  # bytes a second; infinite: the update is taken to cost nothing
    link: Link  # between two of one node
    network: Link  # between nodes, a rank's share
    node: str  # where the network's figure is from
    per_node: int = 8
    overlap: float = 1.0  # share of the backward pass beside which messages travel; 0 where the same cores do both
    is_cpu: bool = False


def _nvidia(
    name: str, memory: float, peak: float, reads: float, link: float, network: float, node: str, nvlink: bool = True
) -> Accelerator:
    """From the units of the data sheets: GB, dense bfloat16 TFLOP/s, GB/s; both links in one direction."""
    hop = NVLINK_HOP if nvlink else PCIE_HOP
    wires = Link(link * GB, hop), Link(network * GB, NETWORK_HOP)
    return Accelerator(name, memory * GB, peak * 1e12, reads * GB, *wires, node)


# The vendor's figures (NVIDIA's data sheets of the accelerators and of its DGX systems; where a sheet has a rate "with
# sparsity" or a link in both directions, half of it). The PCIe cards have no DGX: their network is assumed.
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
    """Machines like this one, a process each, on a network of which nothing is known. Bytes, bytes a second."""
    wire = Link(ETHERNET, GLOO_HOP)
    note = "assumed: 10 Gbit/s each"
    return Accelerator(
        "a CPU like this one", memory, 0.0, memory_bandwidth, wire, wire, note, per_node=1, overlap=0.0, is_cpu=True
    )
