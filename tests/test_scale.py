"""Predictions for many accelerators, compared with calculations by hand."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from conftest import SMALL, flags

from benchmarks.link import errors, fit_link, predict_from_measurements, predict_throughput, ring_seconds
from llm.arch import empty_model, make_model
from llm.commands.planning import plan_scale, plan_scale_prediction
from llm.commands.planning.plan import main, parse_flags
from llm.config import from_settings, read_toml
from llm.config.counts import count_parameters_by_part, flops_per_token
from llm.errors import UserError
from llm.plan import accelerators, arithmetic, clusters, timing
from llm.plan.accelerators import ACCELERATORS, Accelerator, Link
from llm.plan.clusters import COUNTS
from llm.plan.collectives import BUCKET, all_gather_seconds, all_reduce_seconds, bucketed_all_reduce_seconds

LINK, NETWORK = Link(100e9, 1e-6), Link(10e9, 10e-6)
EIGHT = Accelerator("eight a node", 80e9, 1e15, math.inf, LINK, NETWORK, "made up")
ALONE = clusters.Speed(token=1e-6, update=1e-3)
WAYS = ("ddp", "fsdp")


def gpt2(**changes):
    return from_settings({"batch_size": 8, "gradient_accumulation_steps": 128} | changes, preset())


def preset():
    return from_settings(read_toml("gpt2-124m"))


def small(**changes):
    return from_settings(SMALL | {"vocab_size": 30} | changes)


def test_messages_in_closed_form():
    assert all_reduce_seconds(1e9, 1, EIGHT) == all_gather_seconds(1e9, 1, EIGHT) == 0
    # 14 hops of 1/8 of 1 GB at 100 GB/s
    assert all_reduce_seconds(1e9, 8, EIGHT) == pytest.approx(14 * (1e-6 + 0.125e9 / 100e9))
    assert all_gather_seconds(1e9, 8, EIGHT) == pytest.approx(7 * (1e-6 + 0.125e9 / 100e9))
    # two nodes: 28 ms inside, and each rank's 200 MB with its peer of the other node, in two hops of 100 MB
    assert all_reduce_seconds(1.6e9, 16, EIGHT) == pytest.approx(0.028 + 14e-6 + 0.020 + 20e-6)
    assert all_gather_seconds(1.6e9, 16, EIGHT) == pytest.approx(0.014 + 7e-6 + 0.010 + 10e-6)
    # 128 nodes and a tiny message: trees, 7 levels up and down, where a ring has 254 hops
    assert all_reduce_seconds(8, 1024, EIGHT) == pytest.approx(14e-6 + 14 * 10e-6, rel=1e-3)
    assert all_gather_seconds(8, 1024, EIGHT) == pytest.approx(7e-6 + 127 * 10e-6, rel=1e-3)


def test_gradients_are_all_reduced_one_bucket_at_a_time():
    one = all_reduce_seconds(BUCKET, 8, EIGHT)
    assert bucketed_all_reduce_seconds(3 * BUCKET, 8, EIGHT) == pytest.approx(3 * one)
    assert one < bucketed_all_reduce_seconds(BUCKET + 4, 8, EIGHT) < 1.1 * one


def test_groups_have_the_parameters_of_the_model():
    for changes in ({}, {"bias": True, "tied_lm_head": True, "ffn_mult": 3}, {"arch": "llama", "n_kv_head": 1}):
        config = small(**changes)
        model, found = make_model(config.model), arithmetic.count_group_parameters(config.model)
        block = {"attention": model.h[0].attn, "feed-forward": model.h[0].mlp}
        for name, module in block.items():
            assert found[name] == sum(p.numel() for p in module.parameters())
        whole = sum(p.numel() for p in model.parameters())
        assert found["root"] == whole - config.model.n_layer * (found["attention"] + found["feed-forward"])


def test_memory_of_gpt2_from_its_parameters():
    """124,439,808 parameters; attention 2,362,368 and feed-forward 4,722,432 a block, so 39,422,208 for the root."""
    config = gpt2()
    ddp = clusters.rank_memory(config, 8, "ddp")
    assert (ddp["weights"], ddp["gradients"], ddp["optimizer state"]) == (497_759_232, 497_759_232, 995_518_464)
    assert ddp == clusters.rank_memory(config, 1, "ddp") == clusters.rank_memory(config, 1, "fsdp")
    fsdp = clusters.rank_memory(config, 8, "fsdp")
    assert (fsdp["weights"], fsdp["gradients"], fsdp["optimizer state"]) == (62_219_904, 62_219_904, 124_439_808)
    assert fsdp["gathered root"] == 8 * 39_422_208
    assert fsdp["gathered groups"] == 2 * 4_722_432 * (2 + 2 + 4)
    assert fsdp["low-precision copies"] == 2 * 50_257 * 768
    assert fsdp["activations"] == ddp["activations"]
    assert 8 * clusters.rank_memory(config, 1024, "ddp")["activations"] == ddp["activations"]  # one window, not eight
    stream = 8 * 1024 * 768 * 4  # of a micro-batch, float32
    one = arithmetic.memory_for(gpt2(n_layer=1, gradient_accumulation_steps=1), False, 2)["activations"]
    kept = clusters.rank_memory(gpt2(activation_checkpointing=True), 8, "fsdp")
    assert kept["activations"] == one + 12 * stream < fsdp["activations"]
    away = clusters.rank_memory(gpt2(cpu_offload=True), 8, "fsdp")
    assert away["weights"] == away["gradients"] == away["optimizer state"] == 0
    assert away["gathered root"] == fsdp["gathered root"]
    on_cpu = [clusters.rank_memory(gpt2(cpu_offload=offload), 8, "fsdp", True) for offload in (True, False)]
    assert on_cpu[0] == on_cpu[1]  # the shards stay in the memory that is counted
    # 16 micro-batches a rank: all gradients but the root's stay whole until the last one
    assert fsdp["accumulated gradients"] == 4 * 12 * (2_362_368 + 4_722_432)
    assert "accumulated gradients" not in clusters.rank_memory(config, 128, "fsdp")


def test_more_accelerators_never_raise_the_memory_of_a_rank():
    for config in (gpt2(), from_settings({"batch_size": 64, "dtype": "float32"}), small(n_layer=1, batch_size=1024)):
        for way in WAYS:
            for on_cpu in (False, True):
                counts = [count for count in COUNTS if config.windows_per_step % count == 0]
                held = [sum(clusters.rank_memory(config, count, way, on_cpu, 4).values()) for count in counts[1:]]
                assert held == sorted(held, reverse=True)
                assert len(held) > 4
    assert sum(clusters.rank_memory(gpt2(), 2, "fsdp").values()) < sum(clusters.rank_memory(gpt2(), 1, "fsdp").values())


def test_one_process_sends_nothing_and_waits_for_nothing():
    for way in WAYS:
        found = clusters.predicted(gpt2(), 1, way, ACCELERATORS["h100"], ALONE)
        assert (found.messages, found.waiting, found.efficiency) == (0, 0, 1)
        assert found.step == pytest.approx(1024 * 1024 * 1e-6 + 1e-3)
        assert predict_from_measurements(gpt2(), 1, 5000.0, 1e9, 1e-3, way).tokens_per_second == pytest.approx(5000)


def test_two_processes_of_ddp_by_hand():
    """A rank computes half of the windows, then sends two messages, each in two hops of its half, without overlap."""
    config = small()
    counted = count_parameters_by_part(config.model)
    late = 4 * (counted["embedding"] + counted["positions"])
    early = 4 * sum(counted.values()) - late
    found = predict_from_measurements(config, 2, 1000.0, 1e6, 1e-3)
    messages = 2 * (1e-3 + early / 2 / 1e6) + 2 * (1e-3 + late / 2 / 1e6)
    assert found.messages == found.waiting == pytest.approx(messages)
    assert found.step == pytest.approx(4 * 16 / 2 / 1000 + messages)
    assert found.tokens == 4 * 16
    apart = predict_from_measurements(config, 2, 1000.0, 1e6, 1e-3, update=0.004)  # of the 64 ms of one: 60 are shared
    assert apart.step == pytest.approx(0.030 + 0.004 + messages)
    # all gradients but those of the embeddings overlap with the backward pass, two thirds of 32 ms
    hidden = predict_from_measurements(config, 2, 1000.0, 2e6, 1e-3, overlap=1.0)
    assert hidden.waiting == pytest.approx(2 * (1e-3 + late / 2 / 2e6))
    slow = predict_from_measurements(config, 2, 1000.0, 1e5, 1e-3, overlap=1.0)
    assert slow.waiting == pytest.approx(slow.messages - 2 / 3 * 0.032)


def test_two_processes_of_fsdp_by_hand():
    """A micro-batch gathers the blocks twice and the root once, the last one scatters all; each in one hop of half."""
    config = small(batch_size=1, gradient_accumulation_steps=4)  # two micro-batches a rank
    sizes = arithmetic.count_group_parameters(config.model)
    blocks = 2 * (sizes["attention"] + sizes["feed-forward"])
    found = predict_from_measurements(config, 2, 1000.0, 1e6, 0.0, "fsdp", itemsize=2)
    by_hand = 2 * (2 * 2 * blocks + 4 * sizes["root"]) + 4 * (blocks + sizes["root"])
    assert found.messages == pytest.approx(by_hand / 2 / 1e6)
    assert found.waiting == pytest.approx(found.messages)
    hidden = predict_from_measurements(
        config, 2, 1e-3, 1e6, 0.0, "fsdp", overlap=1.0, itemsize=2
    )  # so slow that all is hidden
    assert hidden.waiting == pytest.approx((2 * 4 + 4) * sizes["root"] / 2 / 1e6)


def test_the_update_is_whole_on_each_rank_of_ddp_and_shared_by_fsdp():
    speed = clusters.speed_of(gpt2(), 500_000.0, ACCELERATORS["h100"])
    assert speed.update == pytest.approx(28 * 124_439_808 / 3.35e12)
    step = 1024 * 1024 / 500_000
    assert speed.token * 1024 * 1024 + speed.update == pytest.approx(step)
    ddp, fsdp = (clusters.predicted(gpt2(), 8, way, ACCELERATORS["h100"], speed) for way in WAYS)
    assert ddp.update == pytest.approx(8 * fsdp.update)
    tiny = clusters.speed_of(small(), 1e12, ACCELERATORS["h100"])
    assert tiny.update == pytest.approx(4 * 16 / 1e12 / 2)  # half of a step


def llama_with_muon(**changes):
    """A block has 4 matrices of 512 x 512 and 3 of 512 x 1408: 3,211,264 numbers."""
    shape = {"arch": "llama", "n_layer": 8, "n_embd": 512, "n_head": 8, "block_size": 256, "vocab_size": 4096}
    return from_settings(shape | {"batch_size": 8, "gradient_accumulation_steps": 8, "optimizer": "muon"} | changes)


def test_muon_has_one_moment_and_products_that_every_rank_makes():
    config, h100 = llama_with_muon(), ACCELERATORS["h100"]
    hidden, others = 8 * 3_211_264, 2 * 4096 * 512 + 8 * (2 * 512 + 2 * 64) + 512
    ddp, fsdp = (clusters.rank_memory(config, 8, way) for way in WAYS)
    assert ddp["optimizer state"] == 4 * (hidden + 2 * others) == 8 * fsdp["optimizer state"]
    speed = clusters.speed_of(config, 500_000.0, h100)
    assert speed.update == pytest.approx((20 * hidden + 28 * others) / 3.35e12)
    products = 3 * 8 * (4 * 6 * 512**3 + 3 * (4 * 512 * 512 * 1408 + 2 * 512**3))
    tokens = 64 * 256
    share = products / (products + flops_per_token(config.model) * tokens)
    assert speed.muon == pytest.approx(share * (tokens / 500_000 - speed.update))
    assert speed.token * tokens + speed.update + speed.muon == pytest.approx(tokens / 500_000)
    rate = clusters.assumed_rate(config, h100)
    assert rate * (flops_per_token(config.model) * tokens + products) / tokens == pytest.approx(0.4 * 989e12)
    whole, shared = (clusters.predicted(config, 8, way, h100, speed) for way in WAYS)
    assert whole.update == pytest.approx(speed.update + speed.muon)
    assert shared.update == pytest.approx(speed.update / 8 + speed.muon)


def test_a_teacher_counts_by_what_it_takes_beyond_a_step():
    config = gpt2()
    large = gpt2(n_layer=6, n_embd=8192, n_head=64).model
    counts = {}
    for name, teachers in {"none": [], "small": [config.model], "large": [large]}.items():
        counts[name] = clusters.rank_memory(config, 8, "fsdp", teachers=teachers)
    assert "teachers" not in counts["none"]
    rest = counts["none"]
    assert all(rest == {part: size for part, size in found.items() if part != "teachers"} for found in counts.values())
    freed = sum(rest[part] for part in ("gradients", *arithmetic.OF_A_STEP))
    weights = 4 * sum(math.prod(p.shape) for p in empty_model(large).parameters())
    assert weights - freed < counts["large"]["teachers"] < 2 * weights
    assert counts["small"]["teachers"] < 4 * sum(math.prod(p.shape) for p in empty_model(config.model).parameters())


def test_fsdp_gathers_the_matrices_for_muon():
    muon, adamw = (
        clusters.predicted(llama_with_muon(optimizer=name), 8, "fsdp", EIGHT, ALONE) for name in ("muon", "adamw")
    )
    by_hand = 8 * 7 * (4 * 1e-6 + 2 * 3_211_264 / 8 / 100e9)  # a block's four parameters in bfloat16, 7 hops each
    assert muon.messages - adamw.messages == pytest.approx(by_hand)
    assert muon.waiting - adamw.waiting == pytest.approx(by_hand)


def test_muons_update_counts_where_the_activations_are_smaller():
    one_window = {"batch_size": 1, "block_size": 64, "gradient_accumulation_steps": 64}
    few, many = (clusters.rank_memory(llama_with_muon(**changes), 8, "fsdp") for changes in (one_window, {}))
    groups, square = 8 * 3 * 512 * 1408, 8 * 4 * 512 * 512
    numbers = 2 * (groups + square) + 2 * groups * (1 + 512 / 1408)
    freed = sum(few[part] for part in arithmetic.OF_A_STEP)
    assert 0 < few["Muon's update"] == pytest.approx(2 * numbers - freed, abs=1)
    assert many["Muon's update"] == 0


@pytest.mark.parametrize("name", ACCELERATORS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("growing", [False, True])
def test_efficiency_is_a_share_and_falls(name, way, growing):
    config, accelerator = gpt2(), ACCELERATORS[name]
    speed = clusters.speed_of(config, clusters.assumed_rate(config, accelerator), accelerator)
    rows = clusters.simulated(config, way, accelerator, speed, growing)
    assert [row.ranks for row in rows] == list(COUNTS)  # 1,024 windows
    assert rows[0].efficiency == 1
    assert all(0 < row.efficiency <= 1 for row in rows)
    assert rows[-1].efficiency < rows[1].efficiency < 1
    for row in rows:
        assert row.step == pytest.approx(row.computing + row.update + row.waiting)
        assert row.waiting <= row.messages
        assert row.tokens == (8 * row.ranks if growing else 1024) * 1024


def test_a_step_is_not_split_over_more_ranks_than_it_has_windows():
    config = preset()  # 480 windows
    speed = clusters.Speed(1e-6, 0.0)
    assert [row.ranks for row in clusters.simulated(config, "ddp", EIGHT, speed, False)] == [1, 2, 4, 8, 16, 32]
    with pytest.raises(UserError, match=r"480 windows .* 512, or give 32"):
        clusters.predicted(config, 64, "ddp", EIGHT, speed)
    with pytest.raises(UserError, match="multiple of 8"):
        clusters.predicted(config, 12, "ddp", EIGHT, speed)
    assert clusters.refusal(config, 12, dataclasses.replace(EIGHT, per_node=4)) is None


def test_time_and_cost_of_a_run():
    config = small(max_steps=100, eval_every=50)  # evaluated at 0, 50 and 100
    found = clusters.predicted(config, 2, "ddp", EIGHT, ALONE)
    seconds = clusters.run_time(config, found, ALONE, 6000)
    assert seconds["steps"] == pytest.approx(100 * found.step)
    assert seconds["evaluation"] == pytest.approx(3 * 6000 * 1e-6 / 3 / 2)
    assert clusters.cost(7200, 8, 2.5) == 40
    grown = clusters.weak(config, 8)
    assert grown.windows_per_step == 32
    found = clusters.predicted(
        grown, 8, "ddp", EIGHT, ALONE
    )  # eight times the tokens per step, so an eighth of the steps
    assert clusters.run_time(config, found, ALONE, 0)["steps"] == pytest.approx(100 / 8 * found.step)


def test_the_fit_of_a_link_and_the_errors_of_a_prediction():
    timed = [(size, ring_seconds(size, 4, 2e9, 3e-5)) for size in (1000, 10**6, BUCKET)] + [(10**9, 1e9)]
    assert fit_link(timed, 4) == pytest.approx((2e9, 3e-5))  # of the sizes up to a bucket
    rates = predict_throughput(small(), (1, 2), 1000.0, 2e9, 3e-5)
    assert rates[1] == pytest.approx(1000)
    assert 1000 < rates[2] < 2000
    assert errors(rates, {2: rates[2] / 1.1}) == {2: pytest.approx(0.1)}


# ---- the command


def test_the_names_in_the_help_are_those_of_the_table():
    assert tuple(ACCELERATORS) == plan_scale.ACCELERATORS


def test_how_the_model_is_shared_asks_for_a_plan_for_many(capsys):
    assert not plan_scale.is_requested(parse_flags([]))
    assert plan_scale.is_requested(parse_flags(["--parallel", "fsdp"]))
    args = plan_scale.with_defaults(parse_flags(["--nproc", "2"]))
    assert (args.nproc, args.parallel) == (2, None)
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    assert "Without --parallel: ddp if the model fits, otherwise fsdp." in " ".join(capsys.readouterr().out.split())


def output_of(capsys, *words):
    assert main(list(words)) == 0
    return capsys.readouterr().out


H100 = ("--preset", "gpt2-124m", "--text", "text.txt", "--tokenizer", "gpt2", "--accelerator", "h100")


def test_a_plan_for_eight_in_words(here, capsys):
    out = output_of(capsys, *H100, "--nproc", "8", "--price", "2", "--flops_budget", "120e18")
    lines = out.splitlines()
    assert any(line.startswith("memory      ddp:") and "fits" in line for line in lines)
    assert any(line.startswith("memory      fsdp:") and "gathered root" in line for line in lines)
    assert "40% of the vendor's 989 TFLOP/s, assumed" in out
    assert "1,000 M parameters and 20,000 M tokens" in out  # 6 N 20 N = 120e18
    assert "accelerator-hours at 2" in out
    assert sum(line.startswith("assumed") for line in lines) == 5
    assert not (here / "data").exists()


def test_a_plan_for_many_in_json(here, capsys):
    facts = json.loads(output_of(capsys, *H100, "--nproc", "16", "--parallel", "fsdp", "--scale", "--json"))
    assert facts["step"]["ranks"] == 16
    assert facts["rate_of_one"] == pytest.approx(0.4 * 989e12 / flops_per_token(preset().model))
    assert [row["ranks"] for row in facts["tables"]["strong"]] == [1, 2, 4, 8, 16, 32]
    assert [row["ranks"] for row in facts["tables"]["weak"]] == list(COUNTS)
    assert facts["step"] == next(row for row in facts["tables"]["strong"] if row["ranks"] == 16)


def test_measured_figures_replace_those_of_the_table(here, capsys):
    given = ("--tokens_per_second_per_device", "120000", "--bandwidth", "200", "--network_bandwidth", "12.5")
    facts = json.loads(output_of(capsys, *H100, *given, "--nproc", "4", "--nproc_per_node", "2", "--json"))
    assert facts["rate_of_one"] == 120_000
    kept = facts["accelerator"]
    assert (kept["link"]["bandwidth"], kept["network"]["bandwidth"], kept["per_node"]) == (200e9, 12.5e9, 2)
    assert kept["link"]["latency"] == accelerators.NVLINK_HOP
    assert facts["step"]["tokens_per_second"] == pytest.approx(480_000, rel=0.1)


def test_a_plan_counts_activation_checkpointing_and_offloading(here, capsys):
    words = (*H100, "--nproc", "8", "--parallel", "fsdp", "--scale")

    def memory(*more):
        return json.loads(output_of(capsys, *words, "--json", *more))["memory"]

    def in_table(*more):
        rows = [line.split() for line in output_of(capsys, *words, *more).splitlines()]
        return next(float(row[5]) for row in rows if row[:2] == ["8", "480"])

    plain = memory()
    checkpointed, both = ("--activation_checkpointing",), ("--activation_checkpointing", "--cpu_offload")
    assert memory(*checkpointed)["fsdp"] == plain["fsdp, activation_checkpointing"]
    assert memory(*checkpointed)["ddp"]["activations"] == plain["fsdp, activation_checkpointing"]["activations"]
    assert memory(*both)["fsdp"] == plain["fsdp, that and cpu_offload"]
    ways = {(): "fsdp", checkpointed: "fsdp, activation_checkpointing", both: "fsdp, that and cpu_offload"}
    for more, way in ways.items():
        assert in_table(*more) == pytest.approx(sum(plain[way].values()) / 2**30, abs=0.006)


def test_a_model_too_large_for_ddp_is_planned_with_fsdp(here, capsys):
    large = ("--n_layer", "48", "--n_embd", "3072", "--n_head", "24", "--batch_size", "4")
    out = output_of(capsys, *H100, *large, "--nproc", "32")
    assert "more than fits 80 GB" in out
    assert "speed       fsdp:" in out


def test_a_preset_decides_how_the_model_is_shared(here, capsys):
    (here / "cluster.toml").write_text('parallel = "fsdp"\nvocab_size = 50257\n')
    words = ("--preset", "cluster.toml", "--text", "text.txt", "--tokenizer", "gpt2", "--accelerator", "h100")
    assert "speed       fsdp:" in output_of(capsys, *words, "--nproc", "2")
    assert "speed       ddp:" in output_of(capsys, *words, "--nproc", "2", "--parallel", "ddp")


@pytest.mark.pictures
def test_a_table_over_a_thousand_and_its_picture(here, capsys):
    out = output_of(capsys, *H100, "--scale", "--price", "2", "--out", "scale.png")
    strong, weak = out.split("\n\n")[1:]
    assert strong.startswith("strong scaling, ddp: the run's 480 windows")
    assert "not 64, 128, 256, 512, 1,024: nproc = 64: the 480 windows of a step are not divisible" in strong
    assert [line.split()[0] for line in weak.splitlines()[2:13]] == [f"{count:,}" for count in COUNTS]
    assert (here / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_what_the_command_prints(here, capsys):
    page = (Path(__file__).parent.parent / "docs" / "plan.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n\$ losscurve plan (.*--accelerator .*)\n([^`]*)```", page)
    assert len(blocks) == 2
    for words, printed in blocks:
        wrapped = [re.sub(r"\s+", " ", text).strip() for text in (output_of(capsys, *words.split()), printed)]
        assert wrapped[0].endswith(wrapped[1].removeprefix("… "))


def test_machines_like_this_one_are_measured(here, capsys, monkeypatch):
    monkeypatch.setattr(timing, "probe", lambda config: timing.Pace(0.01, 1e-6, 1e-3))
    monkeypatch.setattr(plan_scale_prediction, "measure_memory_rate", lambda: 1e10)
    out = output_of(capsys, *f"--text text.txt --nproc 2 {flags()}".split())
    assert "2 x a CPU like this one" in out
    assert "6,400 tokens/s of one: measured just now" in out  # 4 windows of 16 in 10 ms
    assert "assumed: 10 Gbit/s each" in out


def test_a_machine_that_is_too_small_is_not_probed(here, monkeypatch):
    for module in (arithmetic, timing):
        monkeypatch.setattr(module, "machine_memory", lambda: 2**20)
    monkeypatch.setattr(plan_scale_prediction, "measure_memory_rate", lambda: 1e10)
    with pytest.raises(UserError, match="does not fit in the memory here"):
        main(f"--text text.txt --nproc 2 {flags()}".split())


@pytest.mark.pictures
@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--nproc 0", "nproc: '0': expected a whole number above 0"),
        ("--nproc two", "nproc: 'two'"),
        ("--price -1 --nproc 2", "price: '-1'"),
        ("--flops_budget nan", "flops_budget: 'nan'"),
        ("--bandwidth inf --nproc 2", "bandwidth"),
        ("--accelerator h1000", "accelerator = 'h1000': expected one of a100-40"),
        ("--accelerator h100 --parallel tp", "parallel = 'tp': expected one of ddp, fsdp"),
        ("--accelerator h100 --mfu 40", "mfu = 40"),
        ("--accelerator h100 --nproc 3", "nproc = 3: the 32 windows"),
        ("--accelerator h100 --nproc 12", "multiple of 8"),
        ("--accelerator h100 --device cpu", "device"),
        ("--accelerator h100 --dtype float32", "dtype"),
        ("--accelerator h100 --time 10m", "time"),
        ("--accelerator h100 --out a.toml", "out"),
        ("--accelerator h100 --scale --out a.toml", "a.toml"),
        ("--acelerator h100", "did you mean --accelerator"),
    ],
)
def test_a_wrong_flag_is_an_error_of_one_line(here, given, named):
    with pytest.raises(UserError) as caught:
        main(["--text", "text.txt", "--tokenizer", "byte", *given.split()])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
