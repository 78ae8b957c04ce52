"""Job files: resolved values, overrides, and every problem told at once."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.errors import InvalidInputError, UnsupportedError
from profiles.job import Job, SearchLimits, read_job
from profiles.presets import fabric_preset, gpu_preset, model_preset, stack_preset
from profiles.quantity import format_quantity

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
LOCAL = """
[model]
preset = "llama-demo"

[workload]
seq_len = 256
global_batch = 8

[cluster]
preset = "local"
ranks = 2
"""
WRITTEN = """
seed = 7
[model]
num_layers = 2
hidden = 64
num_heads = 4
num_kv_heads = 2
ffn = 128
vocab = 256
max_seq_len = 128
[workload]
seq_len = 128
global_batch = 8
dtype = "bf16"
tokens = "1 Gtokens"
[cluster]
fabric = { rate = "400 Gb/s", latency = "14 us" }
[[cluster.pools]]
gpu = { name = "H100", memory = "80 GiB", memory_rate = "3.35 TB/s", \
peak = { bf16 = "989 TFLOP/s" }, power = "700 W" }
gpus_per_node = 8
nodes = 4
intra_node = { rate = "450 GB/s", latency = "4 us" }
[[cluster.pools]]
gpu = { preset = "a100-sxm-80gb", memory = "70 GiB" }
gpus_per_node = 4
intra_node = "nvlink3"
[search]
tp = [2, 1, 2]
schedule = ["1f1b"]
"""
EVERYTHING_WRONG = """
seed = -1
profile = "absent.json"
colour = "red"

[model]
preset = "llama-demo"
num_layers = 4.0
num_layer = 4

[workload]
seq_len = 4096
global_batch = 0
dtype = "fp17"
learning_rate = nan
tokens = 1000

[[cluster.pools]]
gpus_per_node = 8
nodes = 4
intra_node = { rate = "450 GB/s" }
gpu = { name = "x", memory = 80, memory_rate = "3.35 TB", \
peak = { bf17 = "1 TFLOP/s" }, power = "-700 W" }

[stack]
preset = "layline-ncl"

[search]
tp = [1, 0]
pp = []
schedule = ["1f1b", "zero-bubble"]
"""


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A name for a job file in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return Path("job.toml")


def _read(path: Path, text: str, *overrides: str) -> Job:
    path.write_text(text)
    return read_job(path, overrides)


def _problems(path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(InvalidInputError) as caught:
        _read(path, text, *overrides)
    return str(caught.value)


def test_the_example_is_read() -> None:
    job = read_job(ROOT / "examples" / "local.toml")
    assert job.model == model_preset("llama-demo")
    assert (job.workload.seq_len, job.workload.global_batch, job.workload.dtype) == (
        256,
        16,
        "fp32",
    )
    assert job.workload.learning_rate == 2e-3
    assert (job.cluster.name, job.cluster.is_local, job.cluster.num_ranks) == ("local", True, 2)
    assert job.stack == stack_preset("layline-gloo")
    assert (job.seed, job.profile_path, job.search) == (0, "", SearchLimits())


def test_a_written_out_cluster_is_read(job_file: Path) -> None:
    job = _read(job_file, WRITTEN)
    first, second = job.cluster.pools
    assert (job.seed, job.model.head_size, job.workload.tokens) == (7, 16, 10**9)
    assert (first.gpu.memory_bytes, first.gpu.max_power_watts) == (80 * 2**30, 700.0)
    assert first.gpu.peak_flops_per_s == {"bf16": 989e12}
    assert (first.intra_node.bytes_per_s, first.intra_node.latency_ns) == (450e9, 4_000)
    assert second.gpu.memory_bytes == 70 * 2**30
    assert second.gpu.name == "a100-sxm-80gb-changed"
    assert second.gpu.peak_flops_per_s == gpu_preset("a100-sxm-80gb").peak_flops_per_s
    assert job.cluster.num_ranks == 36
    assert job.cluster.inter_node is not None
    assert job.cluster.inter_node.bytes_per_s == 50e9
    assert job.search == SearchLimits(tp=(1, 2), schedule=("1f1b",))
    assert job.stack.name == "layline-nccl"


def test_a_preset_cluster_is_read(job_file: Path) -> None:
    text = LOCAL.replace('preset = "local"\nranks = 2', 'preset = "h100-sxm"\nnodes = 4')
    job = _read(job_file, text)
    assert job.cluster.num_ranks == 32
    assert job.cluster.inter_node == fabric_preset("ndr400")
    other = _read(job_file, text, 'cluster.fabric="roce200"', 'stack.preset="layline-gloo"')
    assert other.cluster.inter_node == fabric_preset("roce200")
    assert other.stack == stack_preset("layline-gloo")


@pytest.mark.usefixtures("job_file")
def test_a_model_may_come_from_a_config_beside_the_file() -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
              "intermediate_size": 128, "vocab_size": 256, "hidden_act": "silu",
              "model_type": "llama", "max_position_embeddings": 512}  # fmt: skip
    Path("sub").mkdir()
    Path("sub/config.json").write_text(json.dumps(config))
    text = LOCAL.replace('preset = "llama-demo"', 'hf_config = "config.json"')
    job = _read(Path("sub/job.toml"), text, "model.num_layers=3")
    assert (job.model.hidden, job.model.num_layers, job.model.name) == (64, 3, "sub-changed")
    Path("sub/config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(UnsupportedError, match="hidden_act"):
        _read(Path("sub/job.toml"), text)
    message = _problems(Path("sub/job.toml"), text, "workload.global_batch=0")
    assert "hidden_act" in message
    assert "global_batch" in message


def test_overrides_change_any_value(job_file: Path) -> None:
    job = _read(job_file, LOCAL, "workload.seq_len=128", "workload.dtype=bf16", "search.tp=[1,2]",
                "model.rope_theta = 5e5", "cluster.ranks=4",
                'workload.tokens="2 Mtokens"')  # fmt: skip
    assert (job.workload.seq_len, job.workload.dtype, job.workload.tokens) == (
        128,
        "bf16",
        2 * 10**6,
    )
    assert (job.model.rope_theta, job.model.name) == (5e5, "llama-demo-changed")
    assert (job.search.tp, job.cluster.num_ranks) == ((1, 2), 4)
    job = _read(job_file, WRITTEN, "cluster.pools.1.nodes=3", "workload.tokens=5 Gtokens",
                'search.schedule=["synthesised"]')  # fmt: skip
    assert (job.cluster.pools[1].num_nodes, job.workload.tokens) == (3, 5 * 10**9)
    assert job.search.schedule == ("synthesised",)
    assert _read(job_file, LOCAL, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_layer=3", '--set model.num_layer is 3; it must be absent: no such key is known '
         'here; did you mean "num_layers"'),
        ("workload.seq_len.x=3", "workload.seq_len is no table"),
        ("seq_len=3", "--set seq_len is 3"),
        ("workload.seq_len", "--set workload.seq_len is no setting; it must be path=value"),
        ("=3", "--set =3 is no setting"),
        ("workload..seq_len=3", "is no setting"),
        ("a." * 5000 + "a=3", "is no setting"),
        ("seed=" + "[" * 400 + "]" * 400, "nested too deeply"),
        ("cluster.pools.0.nodes=3", "--set cluster.pools is"),
        ("workload.seq_len=256.0", "--set workload.seq_len is 256.0; it must be a whole number"),
        ("workload.seq_len=true", "it must be a whole number"),
        ('workload.seq_len="256"', "it must be a whole number"),
        ("seed=1\nprofile=2", "--set seed is"),
        ("workload.learning_rate=inf", "it must be a finite number"),
    ],
)  # fmt: skip
def test_an_override_off_the_schema_is_an_error(job_file: Path, override: str, words: str) -> None:
    assert words in _problems(job_file, LOCAL, override)


def test_an_entry_that_is_not_there_cannot_be_set(job_file: Path) -> None:
    for entry in ("2", "-1", "x", "9" * 30):
        message = _problems(job_file, WRITTEN, f"cluster.pools.{entry}.nodes=3")
        assert "it must be a number below 2 in cluster.pools" in message


def test_every_problem_is_told_at_once(job_file: Path) -> None:
    message = _problems(job_file, EVERYTHING_WRONG, "workload.beta1=2")
    assert message + "\n" == (GOLDEN / "job_every_problem.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seq_len = 256", "seq_len = 513", "workload.seq_len is 513; it must be at most "
         "model.max_seq_len (512)"),
        ("ranks = 2", "ranks = 0", "cluster.ranks is 0; it must be at least 1"),
        ("ranks = 2", "ranks = 2000001", "it must be at most 2,000,000"),
        ("ranks = 2", "", "cluster.ranks is missing"),
        ("ranks = 2", "ranks = 2\nnodes = 3", "cluster.nodes is given; it must be absent where the "
         "preset is local"),
        ("global_batch = 8", "global_batch = 0", "workload.global_batch is 0"),
        ("global_batch = 8", "", "workload.global_batch is missing"),
        ('preset = "local"\nranks = 2', 'preset = "h100-sxm"\nnodes = 300000',
         "cluster is 2,400,000 ranks; it must have at most 2,000,000"),
        ('preset = "local"\nranks = 2', 'preset = "h100"', 'did you mean "h100-sxm"'),
        ('preset = "local"\nranks = 2', "", "cluster.preset is missing"),
        ('preset = "llama-demo"', 'preset = "llama-demo"\nnum_kv_heads = 3',
         "model.num_kv_heads is 3; it must divide"),
        ('preset = "llama-demo"', "hidden = 3", "model.num_layers is missing"),
        ('preset = "llama-demo"', 'preset = "llama-demo"\nhf_config = "x"',
         "remove one of the two"),
        ("[model]", "[modle]", 'did you mean "model"'),
        ('preset = "llama-demo"', 'preset = "a"\npreset = "b"', "not TOML: cannot overwrite"),
        ("[workload]", "[[workload]]", "workload is"),
        ("seq_len = 256", "seq_len = 2024-01-01", "it must be a whole number"),
    ],
)  # fmt: skip
def test_one_problem_has_its_own_text(job_file: Path, old: str, new: str, words: str) -> None:
    assert words in _problems(job_file, LOCAL.replace(old, new))


def test_a_gpu_without_the_dtype_is_refused(job_file: Path) -> None:
    text = LOCAL.replace('preset = "local"\nranks = 2', 'preset = "v100-dgx2"')
    assert _read(job_file, text).cluster.num_ranks == 16
    assert "v100-sxm2-32gb has a peak for (fp32, fp16)" in _problems(
        job_file, text, "workload.dtype=bf16"
    )


def test_several_nodes_need_a_fabric(job_file: Path) -> None:
    text = WRITTEN.replace('fabric = { rate = "400 Gb/s", latency = "14 us" }', "")
    assert "cluster.fabric is missing; several nodes need one" in _problems(job_file, text)


def test_a_profile_is_seen_from_the_job_file(job_file: Path) -> None:
    Path("sub").mkdir()
    Path("sub/p.json").write_text("{}")
    job = _read(Path("sub/job.toml"), 'profile = "p.json"\n' + LOCAL)
    assert Path(job.profile_path) == Path("sub/p.json")
    assert "profile is" in _problems(job_file, 'profile = "a\\u0000b"\n' + LOCAL)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[", b"a = " + b"[" * 50_000, b"\xff\xfe", b"x = 1\n" * 2_000_000,
        b"a = " + b"9" * 5000, b"a" + b".a" * 20_000 + b" = 1", b"a = \x00",
    ],
)  # fmt: skip
def test_hostile_files_are_one_clear_error(job_file: Path, content: bytes) -> None:
    job_file.write_bytes(content)
    with pytest.raises(InvalidInputError) as caught:
        read_job(job_file)
    assert all(str(problem).startswith("job.toml: ") for problem in caught.value.problems)
    assert len(str(caught.value)) < 2_000


def test_a_missing_file_or_a_folder_is_one_clear_error(job_file: Path) -> None:
    with pytest.raises(InvalidInputError, match="no such file"):
        read_job(job_file)
    with pytest.raises(InvalidInputError, match="is a directory"):
        read_job(Path())


@given(size=st.integers(1, 2**40), watts=st.integers(1, 10**5))
def test_written_quantities_arrive_unchanged(
    tmp_path_factory: pytest.TempPathFactory, size: int, watts: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "quantities.toml"
    text = WRITTEN.replace("80 GiB", f"{size} B").replace("700 W", f"{watts} W")
    gpu = _read(path, text).cluster.pools[0].gpu
    assert (gpu.memory_bytes, gpu.max_power_watts) == (size, watts)
    assert format_quantity(gpu.memory_bytes, "bytes")
