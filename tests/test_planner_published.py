"""Rows of published runs: what each text means, what contradicts, and that no row ends a file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.flops import step_flops
from planner.published.layout import split_layers
from planner.published.model import read_model
from planner.published.runs import NEEDED_COLUMNS, PublishedRun, UnreadRun, load_runs, read_run
from profiles.errors import InvalidInputError
from profiles.model import ModelSpec
from profiles.presets import model_preset, stack_preset

ROW = {
    "id": "lab-0007", "framework": "Megatron-LM", "date": "2024-05", "model": "Llama-3-8B",
    "params_b": "8.03", "hidden": "4096", "ffn": "14336", "layers": "32", "heads": "32",
    "kv_heads": "8", "head_dim": "128", "vocab": "128256", "tie_embeddings": "false",
    "seq_len": "8192", "gpu": "H100-SXM5-80GB", "gpu_mem_gb": "80", "gpus": "16",
    "gpus_per_node": "8", "intra_node_link": "NVLink4 900GB/s (bidir)",
    "inter_node_link": "NDR InfiniBand 400 Gb/s per GPU", "tp": "2", "sp": "true", "cp": "1",
    "ep": "", "pp": "2", "vpp": "1", "schedule": "1F1B", "dp": "4",
    "zero_stage_or_sharding": "distributed optimizer", "micro_batch": "1", "global_batch": "128",
    "grad_accum": "32", "recompute": "none", "attention_kernel": "FlashAttention-2",
    "precision": "bf16", "compile": "", "metric": "step_time_s", "value": "12.5", "unit": "s",
    "peak_mem_gb": "", "notes": "",
}  # fmt: skip


def read(**changes: str) -> PublishedRun:
    run = read_run(ROW | changes)
    assert isinstance(run, PublishedRun), run.reason
    return run


def refused(**changes: str) -> str:
    run = read_run(ROW | changes)
    assert isinstance(run, UnreadRun)
    return run.reason


def test_a_complete_row_is_read_without_a_remark() -> None:
    run = read()
    (setup,) = run.setups
    layout = setup.layout
    assert (run.id, run.group, run.remarks) == ("lab-0007", "lab", ())
    assert str(layout) == "dp=4,tp=2,sp,pp=2,1f1b,zero1,mb=1x32"
    assert (layout.sequence_parallel, layout.stage_layers) == (True, (16, 16))
    assert (setup.model.num_parameters, setup.model.vocab) == (8_030_261_248, 128_256)
    assert (setup.workload.dtype, setup.stack.name) == ("bf16", "megatron-2023")
    assert (setup.cluster.num_ranks, setup.cluster.pools[0].gpu.name) == (16, "h100-sxm")
    assert run.measured.step_ns == 12_500_000_000


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dp": "3"}, "gpus is 16, but tp 2 x cp 1 x pp 2 x dp 3 is 12"),
        ({"gpus": "17", "dp": ""}, "gpus is 17, but tp 2 x cp 1 x pp 2 x dp 4 is 16"),
        ({"gpus": "1000000000"}, 'gpus is "1000000000"; it must be above 0 and at most 1e+06'),
        ({"grad_accum": "31"}, "micro_batch 1 x grad_accum 31 x dp 4 is 124"),
        ({"global_batch": "127"}, "global_batch is 127, no multiple of dp (4)"),
        ({"global_batch": "", "grad_accum": ""}, "global_batch not stated"),
        ({"tp": "3", "gpus": "24"}, "heads is 32, no multiple of tp (3)"),
        ({"ep": "3"}, "ep is 3; it must divide dp x cp (4)"),
        ({"ep": "2"}, 'experts of "Llama-3-8B" are not known (ep > 1)'),
        ({"layers": "1", "params_b": ""}, "layers is 1, fewer than the 2 stages"),
        ({"gpu": "TPU v5p"}, 'gpu is "TPU v5p"; known are '),
        ({"gpu": ""}, 'gpu is ""; known are '),
        ({"precision": "nvfp4"}, 'precision is "nvfp4"; modelled are '),
        ({"precision": "fp8", "gpu": "A100-SXM4-80GB"}, "precision is fp8; a100-sxm-80gb has "),
        ({"recompute": "full (CPU offload)"}, "without offload"),
        ({"recompute": "full, 10 of 32 layers"}, "full in all layers"),
        ({"schedule": "DualPipe"}, 'schedule is "DualPipe"; modelled are '),
        ({"model": "DeepSeek-V3"}, 'model "DeepSeek-V3" is no decoder of plain attention'),
        ({"model": "Llama-3-8B LoRA"}, "is no pre-training (lora)"),
        ({"params_b": "46.7"}, "params_b is 46.7, but the columns make 8.03; experts"),
        ({"hidden": "", "model": "mine"}, "hidden not stated"),
        ({"hidden": "nan"}, 'hidden is "nan"; it must be above 0'),
        ({"layers": "-4"}, 'layers is "-4"; it must be above 0'),
        ({"layers": "32.5"}, 'layers is "32.5"; it must be a whole number'),
        ({"layers": "many"}, 'layers is "many"; it must be a number'),
        ({"value": "inf"}, 'value is "inf"; it must be above 0'),
        ({"value": ""}, 'value is ""; it must be a number'),
        ({"value": "1e300"}, "value is 1e+300 s, a step of "),
        ({"metric": "loss", "unit": ""}, 'metric is "loss"; known are step_time_s, '),
        ({"micro_batch": "1", "grad_accum": "250000", "global_batch": "1000000"}, "above 100,000"),
        ({"zero_stage_or_sharding": "FSDP=3 x DP=1"}, "a shard group of 3 must divide dp x cp (4)"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_why(changes: dict[str, str], reason: str) -> None:
    assert reason in refused(**changes)


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"inter_node_link": ""}, "fabric not stated: ndr400, the usual one"),
        ({"precision": ""}, "precision not stated: bf16 assumed"),
        ({"vocab": "", "params_b": ""}, "vocab not stated: 128256, as its family has"),
        ({"framework": "NewThing"}, 'framework "NewThing" is taken as megatron-2023, the nearest'),
        ({"framework": ""}, "framework not stated: it is taken as megatron-2023, the nearest"),
        ({"micro_batch": "", "grad_accum": ""}, "micro_batch not stated: 1 assumed"),
        ({"vpp": "", "schedule": "interleaved 1F1B"}, "vpp not stated: 2 assumed"),
        ({"vpp": "", "notes": "title (TP=4, VP=8)"}, "vpp not stated: 8 as in the notes"),
        ({"hidden": "", "heads": ""}, "hidden not stated: as in llama-3-8b"),
        ({"params_b": "9.2"}, "params_b is 9.2, but the columns make 8.03; the columns are taken"),
        ({"gpu": "GH200", "gpu_mem_gb": ""}, "GH200 is taken as H100 SXM, the same silicon"),
        ({"gpus": "12", "dp": "3", "global_batch": "96"}, "12 GPUs do not fill nodes of 8"),
    ],
)
def test_what_is_assumed_is_said(changes: dict[str, str], remark: str) -> None:
    assert any(said.startswith(remark) for said in read(**changes).remarks)


def test_empty_cells_are_the_usual() -> None:
    needed = {name: text for name, text in ROW.items() if name in NEEDED_COLUMNS}
    run = read_run(needed)
    assert isinstance(run, PublishedRun)
    # An unknown framework with data parallelism alone is taken as torchtitan.
    assert str(run.setups[0].layout) == "dp=16,tp=1,pp=1,zero3,recompute=selective,mb=1x8"
    assert [setup.layout.recompute for setup in run.setups] == ["selective", "full"]


def test_batches_follow_from_one_another() -> None:
    assert read(grad_accum="").setups[0].layout.num_microbatches == 32
    assert read(micro_batch="").setups[0].layout.micro_batch == 1
    assert read(global_batch="").setups[0].workload.global_batch == 128


def test_the_assumed_micro_batch_is_that_of_the_authors() -> None:
    """`examples/sc21/run_table_1.sh` of NVIDIA/Megatron-LM, all but the 18B model (8 there)."""
    table = (("2304", "24", "24", 1, 1, 512, 32, 16), ("8192", "48", "64", 8, 2, 1536, 512, 4),
             ("10240", "60", "80", 8, 4, 1792, 1024, 2), ("12288", "80", "96", 8, 8, 2304, 1536, 2),
             ("16384", "96", "128", 8, 16, 2160, 1920, 1),
             ("20480", "105", "128", 8, 35, 2520, 2520, 1))  # fmt: skip
    for hidden, layers, heads, tp, pp, batch, gpus, micro in table:
        run = read(
            model="GPT", params_b="", hidden=hidden, ffn="", layers=layers, heads=heads,
            kv_heads="", head_dim="", vocab="51200", tie_embeddings="true", seq_len="2048",
            tp=str(tp), pp=str(pp), vpp="", dp="", gpus=str(gpus), global_batch=str(batch),
            micro_batch="", grad_accum="", recompute="full", gpu="A100-SXM4-80GB",
        )  # fmt: skip
        assert run.setups[0].layout.micro_batch == micro


def test_hybrid_sharding_stays_inside_a_node() -> None:
    assert (
        read(zero_stage_or_sharding="HSDP", pp="1", dp="8", grad_accum="16")
        .setups[0]
        .layout.shard_group
        == 4
    )


def shape_of(**changes: str) -> ModelSpec:
    return read_model({**ROW, "vocab": "", "kv_heads": "", "tie_embeddings": "", **changes}).model


@pytest.mark.parametrize(
    "name",
    ["llama-2-7b", "llama-2-70b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b", "gpt-3-175b"],
)
def test_open_columns_are_told_by_the_parameters(name: str) -> None:
    """Gated or not, tied or not, shared key heads or not: the published shape comes out."""
    preset = model_preset(name)
    shape = shape_of(
        model=name, params_b=f"{preset.num_parameters / 1e9:.2f}", hidden=str(preset.hidden),
        ffn=str(preset.ffn), layers=str(preset.num_layers), heads=str(preset.num_heads),
        head_dim="", seq_len=str(preset.max_seq_len),
    )  # fmt: skip
    assert shape.num_parameters == pytest.approx(preset.num_parameters, rel=0.001)
    assert (shape.mlp, shape.num_kv_heads, shape.tied_embeddings) == (
        preset.mlp, preset.num_kv_heads, preset.tied_embeddings,
    )  # fmt: skip


def test_mixtral_has_its_experts() -> None:
    shape = shape_of(model="Mixtral-8x7B", params_b="46.7", vocab="32000", kv_heads="8")
    assert (shape.num_experts, shape.experts_per_token) == (8, 2)
    assert shape.num_parameters == pytest.approx(46.7e9, rel=0.01)


def test_a_vocabulary_follows_from_exact_parameters() -> None:
    shape = shape_of(model="mine", params_b="8.030", kv_heads="8", tie_embeddings="false")
    assert shape.vocab == pytest.approx(128_256, rel=0.01)


@pytest.mark.parametrize(
    ("layers", "stages", "counts"),
    [(126, 64, (1, *[2] * 62, 1)), (30, 32, (0, *[1] * 30, 0)), (78, 12, (7,) * 6 + (6,) * 6),
     (80, 40, (2,) * 40)],
)  # fmt: skip
def test_stages(layers: int, stages: int, counts: tuple[int, ...]) -> None:
    assert split_layers(shape_of(layers=str(layers), params_b=""), stages, "even") == counts


def test_nanotron_cuts_by_weight() -> None:
    """What the peak memory of the published runs shows: 10 layers and the embedding of 16."""
    model = shape_of(
        model="Llama-like", params_b="1.34", layers="16", hidden="2048", heads="16", ffn="8192",
        vocab="131072", head_dim="", tie_embeddings="true",
    )  # fmt: skip
    assert split_layers(model, 2, "cost") == (10, 6)


def test_hardware_flops_are_those_of_megatron() -> None:
    run = read(
        model="GPT-3", params_b="", hidden="12288", ffn="49152", layers="96", heads="96",
        kv_heads="96", seq_len="2048", vocab="51200", tie_embeddings="true", recompute="full",
        metric="hw_tflops_per_gpu", value="140", unit="TFLOP/s/GPU",
    )  # fmt: skip
    layers, h, s, v, batch = 96, 12288, 2048, 51200, 128
    flops = 96 * batch * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert step_flops(run.setups[0], causal=False, recomputed=True) == pytest.approx(
        flops, rel=1e-4
    )
    assert run.measured.step_ns == pytest.approx(flops / (140e12 * 16) * 1e9, rel=1e-4)


def test_every_unit_means_the_same_step() -> None:
    tokens, sequences, gpus = 128 * 8192, 128, 16
    flops = step_flops(read().setups[0], causal=False, recomputed=False)
    for metric, value, unit in (
        ("step_time_s", 20.0, "s"), ("step_time_ms", 20000.0, ""), ("iteration_time", 20.0, "s"),
        ("tokens_per_s_per_gpu", tokens / 20 / gpus, "tokens/s/GPU"),
        ("tokens_per_s", tokens / 20, "tokens/s"), ("samples_per_s", sequences / 20, "samples/s"),
        ("model_tflops_per_gpu", flops / 20e12 / gpus, "TFLOP/s/GPU"),
        ("mfu_percent", 100 * flops / 20 / gpus / 989e12, "%"),
    ):  # fmt: skip
        measured = read(metric=metric, value=repr(value), unit=unit).measured
        assert measured.step_ns == pytest.approx(20e9), metric
        assert measured.in_unit(measured.step_ns) == pytest.approx(value)
        assert measured.is_rate == ("time" not in metric)


def test_memory_is_what_the_source_says() -> None:
    assert read(peak_mem_gb="24.5").peak_bytes == 24.5 * 2**30
    logs = {
        "": stack_preset("megatron-2023").logs_memory,
        "peak_mem=max allocated": "allocated",
        "mem reserved 42 GB; peak_mem=max allocated": "allocated",
        "peak_mem = max reserved": "reserved",
        "nvidia-smi": "device",
    }
    assert {notes: read(notes=notes).memory_log for notes in logs} == logs


def test_pipelines_before_the_fix_of_nanotron_are_a_stack_of_their_own() -> None:
    notes = "HF ultrascale-playbook bench; "
    stacks = [
        read(framework="nanotron", notes=said, pp=pp, dp=dp, grad_accum="").setups[0].stack.name
        for said, pp, dp in ((notes, "2", "4"), (notes, "1", "8"), ("", "2", "4"),
                             (notes + "after_pp_fix=True", "2", "4"))
    ]  # fmt: skip
    assert stacks == ["nanotron-unfixed", "nanotron", "nanotron", "nanotron"]


def test_out_of_memory_is_no_time() -> None:
    measured = read(metric="oom", value="1", unit="bool").measured
    assert (measured.ran_out_of_memory, measured.step_ns) == (True, 0)


def write(path: Path, *records: dict[str, str], header: list[str] | None = None) -> Path:
    names = header or list(ROW)
    lines = [",".join(names), *(",".join(record[name] for name in names) for record in records)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_file_is_read_row_by_row(tmp_path: Path) -> None:
    runs = load_runs(write(tmp_path / "runs.csv", ROW, ROW | {"id": "x-1", "gpus": "?"}, ROW))
    assert [type(run).__name__ for run in runs] == ["PublishedRun", "UnreadRun", "PublishedRun"]
    assert [run.group for run in runs] == ["lab", "x", "lab"]
    assert isinstance(runs[2], PublishedRun)
    assert runs[2].remarks == ("id stands in the file before",)


def test_only_the_needed_columns_are_needed(tmp_path: Path) -> None:
    (run,) = load_runs(write(tmp_path / "runs.csv", ROW, header=list(NEEDED_COLUMNS)))
    assert isinstance(run, PublishedRun)


@pytest.mark.parametrize("missing", NEEDED_COLUMNS)
def test_a_missing_column_is_named(tmp_path: Path, missing: str) -> None:
    path = write(tmp_path / "runs.csv", ROW, header=[name for name in ROW if name != missing])
    with pytest.raises(InvalidInputError, match=f"the header is without {missing}; it must name"):
        load_runs(path)


def test_marks_line_ends_and_spaces_do_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", ROW | {"gpus": " 16 ", "notes": "5 \N{MICRO SIGN}s"})
    text = path.read_text(encoding="utf-8").replace("id,", " ID ,", 1).replace("\n", "\r\n")
    for data in (
        b"\xef\xbb\xbf" + text.encode(),
        text.encode("latin-1"),
        text.encode() + b"\n,,\n",
    ):
        path.write_bytes(data)
        (run,) = load_runs(path)
        assert isinstance(run, PublishedRun)


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"hello\n", b"\x00" * 4096, b"\xff\xfe" + "id,model".encode("utf-16-le"),
     b"id;model;hidden;layers\n", (",".join([*ROW, "id"]) + "\n").encode()],
)  # fmt: skip
def test_what_is_no_table_of_runs_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(data)
    with pytest.raises(InvalidInputError, match="the header is"):
        load_runs(path)


def test_a_file_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(InvalidInputError, match="name a CSV file"):
            load_runs(path)


def test_short_long_and_huge_rows_cost_only_themselves(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", ROW | {"notes": "x" * 1_000_000})
    with path.open("a", encoding="utf-8") as file:
        file.write("cut-1,only,a,start\n")
        file.write(",".join([*ROW.values(), "beyond"]) + "\n")
        file.write('open-1,"quote that never ends\n')
    runs = load_runs(path)
    assert [type(run).__name__ for run in runs] == ["PublishedRun"] + ["UnreadRun"] * 3
    assert isinstance(runs[2], UnreadRun)
    assert runs[2].reason == "the row has more cells than the header"


CELLS = st.one_of(
    st.text(max_size=12),
    st.sampled_from([text for text in ROW.values() if text]),
    st.sampled_from(["0", "-1", "nan", "inf", "1e309", "9" * 400, "1e5", "0.5", "true", "7" * 5]),
    st.integers(-5, 10**9).map(str),
)


@given(changes=st.dictionaries(st.sampled_from(sorted(ROW)), CELLS, max_size=8))
def test_no_row_raises(changes: dict[str, str]) -> None:
    run = read_run(ROW | changes)
    if isinstance(run, UnreadRun):
        assert run.reason
        assert len(run.reason) < 2000
    else:
        for setup in run.setups:
            assert setup.layout.num_ranks == setup.cluster.num_ranks
            assert setup.layout.global_batch == setup.workload.global_batch
            assert sum(setup.layout.stage_layers) == setup.model.num_layers
        assert run.measured.step_ns > 0 or run.measured.unit == "bool"
