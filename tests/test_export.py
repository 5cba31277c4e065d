"""Exported folders: complete or absent, read back exactly, the same bytes from whatever they were written."""

import ast
import json
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import export as command
from jaxlin import generate, hf_fla, runs
from jaxlin.command_line import parse_run
from jaxlin.config import RopeScaling, RunConfig, UserError
from jaxlin.convert import load_config, load_teacher
from jaxlin.evaluation.subject import params_sha256
from jaxlin.export import export, open_student, push
from jaxlin.hf_student import CODE, HUB
from jaxlin.mixers import MIXERS
from jaxlin.sharding import param_shardings
from jaxlin.student import abstract_params, student_config
from tests.exported import contents, folder_of, run_folder, student
from tests.models import STUDENT_MIXERS, TEACHER, random_params, student_of
from tests.tiny_llama import assert_same

PRESETS = [(mixer, preset) for mixer in STUDENT_MIXERS for preset in ("recommended", "paper_code")]
FLA = [
    ("gated_deltanet", "paper_code", {}),
    ("gated_deltanet", "paper_code", {"gate_activation": "sigmoid", "allow_neg_eigval": True}),
    ("deltanet", "paper_code", {}),
    ("gla", "paper_code", {}),
    ("kda", "paper", {}),
    ("retnet", "paper_code", {"conv_size": 0}),
]


def run_command(monkeypatch, module, *args):
    monkeypatch.setattr(sys, "argv", ["python", *map(str, args)])
    module.main()


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mixer", "preset"), [*PRESETS, ("kda", "paper"), ("gla+softmax", "paper_code")])
def test_round_trip(mixer, preset, tmp_path):
    """A folder is read to the same config, parameters and tokenizer, and written again to the same bytes."""
    config = student_of(mixer, preset)
    folder = folder_of(config, tmp_path / "out")
    found_config, params, tokenizer = load_teacher(str(folder))
    assert found_config == config
    assert_same(params, random_params(config))
    assert tokenizer("w3 w4").input_ids == [3, 4]
    export(open_student(folder), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "out"]


@pytest.mark.parametrize("shard_bytes", [10**9, 8000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_of_another_llama(dtype, shard_bytes, tmp_path):
    config = replace(
        student_of("gated_deltanet+softmax", "recommended"), attention_bias=True, mlp_bias=True,
        qk_norm=True, head_dim=24, tie_word_embeddings=False, rope_theta=500.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), dtype="bfloat16",
    )  # fmt: skip
    folder = folder_of(config, tmp_path / "out", dtype=dtype, shard_bytes=shard_bytes)
    assert (folder / "model.safetensors.index.json").exists() == (shard_bytes == 8000)
    found_config, params, _ = load_teacher(str(folder))
    assert found_config == config
    assert_same(params, jax.tree.map(lambda a: a.astype(dtype), random_params(config)))


def test_safetensors_reads_the_file(tmp_path):
    """The file is one that safetensors' own writer could have written."""
    from safetensors.numpy import load_file

    config = student_of("kda")
    tensors = load_file(folder_of(config, tmp_path / "out") / "model.safetensors")
    mixer = random_params(config)["layers"]["block_0"]["mixer"]
    name = "model.layers.1.mixer.{}".format
    assert np.array_equal(tensors[name("o_proj.weight")], mixer["o_proj"]["kernel"][1].reshape(-1, 64).T)
    assert np.array_equal(tensors[name("k_conv1d.weight")][:, 0], mixer["k_conv1d"]["kernel"][1].reshape(4, -1).T)
    assert np.array_equal(tensors[name("dt_bias")], mixer["dt_bias"][1])
    assert np.array_equal(tensors[name("g_proj_down.weight")], mixer["g_proj_down"]["kernel"][1].T)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("qwen2", dict(attention_bias=True)), ("qwen3", dict(qk_norm=True))],
)
def test_softmax_becomes_what_it_was(kind, changes, tmp_path):
    """The fine-tuned teacher, the baseline, needs no code of ours."""
    folder = folder_of(replace(TEACHER, mixer=("softmax",), **changes), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    assert not list(folder.glob("*.py"))
    export(open_student(folder), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_mixed_dtypes_become_float32(tmp_path):
    given = student(student_of("gla"))
    rounded = given.params | {"norm": {"weight": given.params["norm"]["weight"].astype(jnp.bfloat16)}}
    export(replace(given, params=rounded), tmp_path / "out")
    _, params, _ = load_teacher(str(tmp_path / "out"))
    assert_same(params, jax.tree.map(lambda a: a.astype(jnp.float32), rounded))


def test_memory(tmp_path):
    """While writing, host memory holds one stacked parameter's copy and a tensor besides the parameters."""
    config = student_of("retnet", teacher=replace(TEACHER, intermediate_size=1024, num_hidden_layers=24))
    given = student(config)
    jax.block_until_ready(given.params)
    export(given, tmp_path / "first")  # what Python and JAX keep for themselves from then on
    tracemalloc.start()
    try:
        export(given, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(given.params)]
    assert peak <= max(sizes) + 8 * 4 * 64 * 1024 < sum(sizes) / 2


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_command(tmp_path, monkeypatch, capsys):
    """From a run folder to a folder, and from that one to another: every file is the same."""
    run = run_folder(tmp_path / "run", "--mixer", "gated_deltanet", "--text", "/data/books/corpus.txt")
    run_command(monkeypatch, command, "--run", run.folder, "--out", tmp_path / "out")
    assert capsys.readouterr().out == f"written to {tmp_path / 'out'}\n"
    files = contents(tmp_path / "out")
    assert set(files) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "run_card.json", "tokenizer.json",
        "tokenizer_config.json", *CODE,
    }  # fmt: skip
    assert all(files[name] == (HUB / name).read_bytes() for name in CODE)
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [256]
    assert not any(str(tmp_path).encode() in text or b"/data/books" in text for text in files.values())
    run_command(monkeypatch, command, "--run", tmp_path / "out", "--out", tmp_path / "again")
    assert contents(tmp_path / "again") == files


def test_a_mesh_leaves_no_trace(tmp_path):
    """Parameters spread over eight devices, and a run that saved them so, give the bytes of one device."""
    run = parse_run(["--config", "tiny", "--mixer", "gated_deltanet"])
    config = student_config(run, runs.teacher_config(run))
    params = random_params(config)
    mesh = jax.make_mesh((1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    spread = jax.device_put(params, param_shardings(abstract_params(config), mesh))
    assert len(spread["layers"]["block_0"]["mixer"]["q_proj"]["kernel"].sharding.device_set) == 8
    folders = {}
    for name, placed in (("one", params), ("eight", spread)):
        run = run_folder(tmp_path / name / "run", "--mixer", "gated_deltanet", params=placed)
        export(open_student(run.folder), tmp_path / name / "out")
        folders[name] = contents(tmp_path / name / "out")
        export(replace(open_student(run.folder), params=placed), tmp_path / name / "direct")
        assert contents(tmp_path / name / "direct") == folders[name]
    assert folders["one"] == folders["eight"]


def test_model_card(tmp_path):
    """It tells what was measured of these parameters, and of no others; times are left out."""
    run = run_folder(tmp_path / "run", "--mixer", "gla+softmax", "--teacher", "some-org/Some-1B")
    sha256 = params_sha256(run.params())
    results = {"held_out": {"student": {"perplexity": 12.5, "kl": None}, "teacher": {"perplexity": 9.25}},
               "speed": {"student": {"decode_tokens_per_second": 1.0}}}  # fmt: skip
    run.write("evaluation.json", {"suite": "quick", "params_sha256": sha256, "results": results})
    (run.folder / "evaluation").mkdir()
    stale = {"suite": "zero_shot", "params_sha256": "another", "results": {"arc_easy": {"student": {"acc": 0.5}}}}
    run.write("evaluation/zero_shot.json", stale)
    of_three = {"results": {"bear": {"student": {"acc": 0.5}}}, "details": {"bear": {"student": {"n": 3}}}}
    run.write("evaluation/bear.json", {"suite": "bear", "params_sha256": sha256} | of_three)
    card = command.run_card(run, 6, run.params())
    given = replace(student(run.student), card=card)
    export(given, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| held_out | perplexity |  | 12.5000 | 9.2500 |" in text
    assert "| bear | acc | 3 | 0.5000 | - |" in text
    assert "base_model: some-org/Some-1B" in text
    assert "in each 2 layers in turn" in text and "- `gla`: S_t = diag(exp(g_t)) S_{t-1}" in text
    assert "arc_easy" not in text and "speed" not in text


def test_generate_writes_the_same_text(tmp_path, monkeypatch, capsys):
    """`--teacher FOLDER` is the student that `--run` was, in the same dtypes."""
    run = run_folder(tmp_path / "run", "--mixer", "gated_deltanet", "--dtype", "bfloat16")
    export(open_student(run.folder), tmp_path / "out")
    loaded = runs.load_teacher(RunConfig(teacher=str(tmp_path / "out")))
    assert loaded.config == run.student
    assert_same(loaded.params, random_params(run.student))
    texts = []
    for flags in (["--run", run.folder], ["--teacher", tmp_path / "out"]):
        run_command(monkeypatch, generate, *flags, "--prompt", "Some text", "--max-new-tokens", 20)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("Some text")


# ---- FLA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mixer", "preset", "options"), FLA)
def test_fla_loads_it(mixer, preset, options, tmp_path):
    """Its class, made without weights, has the tensors of the folder and no others, in their shapes."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("fla.models", reason="flash-linear-attention is not installed")
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = folder_of(student_of(mixer, preset, **options), tmp_path / "out", format="fla")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict(tensors, strict=False, assign=True)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert {name: tuple(value.shape) for name, value in tensors.items()} == expected


def test_fla_names(tmp_path):
    """What flash-linear-attention 0.6.0 calls the tensors of a Kimi Delta Attention layer."""
    from safetensors.numpy import load_file

    folder = folder_of(student_of("kda", "paper"), tmp_path / "out", format="fla")
    shapes = {name: value.shape for name, value in load_file(folder / "model.safetensors").items()}
    layer = {name.removeprefix("model.layers.1."): shape for name, shape in shapes.items() if ".layers.1." in name}
    convolutions = {f"attn.{name}_conv1d.weight": (64, 1, 4) for name in "qkv"}
    projections = {f"attn.{name}_proj.weight": (64, 64) for name in "qkvo"}
    assert layer == {
        "attn_norm.weight": (64,), "mlp_norm.weight": (64,), **convolutions, **projections,
        "mlp.gate_proj.weight": (96, 64), "mlp.up_proj.weight": (96, 64), "mlp.down_proj.weight": (64, 96),
        "attn.f_proj.0.weight": (16, 64), "attn.f_proj.1.weight": (64, 16), "attn.b_proj.weight": (4, 64),
        "attn.g_proj.0.weight": (16, 64), "attn.g_proj.1.weight": (64, 16), "attn.g_proj.1.bias": (64,),
        "attn.A_log": (4,), "attn.dt_bias": (64,), "attn.o_norm.weight": (16,),
    }  # fmt: skip
    assert {"model.embeddings.weight", "model.norm.weight"} == {n for n in shapes if ".layers." not in n}
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_heads"], config["head_dim"]) == ("kda", 4, 16)
    assert not list(folder.glob("*.py"))


@pytest.mark.parametrize(
    ("mixer", "preset", "options", "said"),
    [
        ("mlstm", "paper_code", {}, "mixer=mlstm has no counterpart there, only deltanet, gated_deltanet, gla"),
        ("gla+softmax", "paper_code", {}, r"mixer=gla\+softmax has no counterpart"),
        ("kda", "paper_code", {}, "kda with out_gate=added has no counterpart there, only random"),
        ("retnet", "paper_code", {}, "retnet with conv_size=4 has no counterpart there, only 0"),
        ("retnet", "paper_code", {"conv_size": 0, "heads": "teacher"}, "expand_kv=False|no counterpart"),
        ("gated_deltanet", "recommended", {}, "gated_deltanet with rope=teacher has no counterpart there, only none"),
        ("gated_deltanet", "paper_code", {"conv_size": 0}, "SiLU is applied to q, k and v"),
        ("gla", "paper_code", {"heads": "teacher", "expand_kv": False}, "gla with expand_kv=False has no counterpart"),
        ("gla", "paper_code", {"decay_rank": 8}, "gla with decay_rank=8 has no counterpart there, only 16"),
        ("deltanet", "paper_code", {"qk_rmsnorm": True}, "deltanet with qk_rmsnorm=True has no counterpart"),
    ],
)
def test_fla_refuses(mixer, preset, options, said):
    config = student_of(mixer, preset, replace(TEACHER, num_attention_heads=16, head_dim=4), **options)
    with pytest.raises(UserError, match=said) as error:
        hf_fla.check(config)
    assert "\n" not in str(error.value)
    for name in ("attention_bias", "qk_norm"):
        with pytest.raises(UserError, match=f"{name}=true has no counterpart"):
            hf_fla.check(replace(student_of("deltanet", "paper_code"), **{name: True}))


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_export_refuses(tmp_path, monkeypatch):
    config = student_of("gla")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match=r"--out .*full: exists already; give a folder that does not"):
        run_command(monkeypatch, command, "--run", tmp_path / "nowhere", "--out", tmp_path / "full")
    with pytest.raises(UserError, match="--push name: give a repository as ORGANISATION/NAME"):
        run_command(monkeypatch, command, "--run", tmp_path, "--out", tmp_path / "out", "--push", "name")
    with pytest.raises(UserError, match="nowhere: no run there"):
        run_command(monkeypatch, command, "--run", tmp_path / "nowhere", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="has no counterpart"):
        export(student(config), tmp_path / "out", format="fla")
    with pytest.raises(ValueError, match="params: embed_tokens/embedding has shape"):
        export(replace(student(config), config=replace(config, vocab_size=98)), tmp_path / "out")
    with pytest.raises(ValueError, match="the student's card lacks settings: see run_card"):
        export(replace(student(config), card={"card": {}}), tmp_path / "out")
    monkeypatch.setitem(MIXERS, "mine", MIXERS["gla"])
    with pytest.raises(UserError, match=r"mixer=mine has no counterpart in PyTorch, .* jaxlin/hub/mixers_jaxlin.py is"):
        export(student(replace(config, mixer=("mine",))), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_the_models_code_knows_every_mixer():
    """Read, not imported: also where torch is not installed."""
    for file in ("configuration_jaxlin.py", "mixers_jaxlin.py"):
        found = [node for node in ast.parse((HUB / file).read_text()).body if ast.unparse(node).startswith("MIXERS")]
        (names,) = (node.value for node in found if isinstance(node, ast.Assign | ast.AnnAssign))
        keys = names.keys if isinstance(names, ast.Dict) else names.elts
        assert [key.value for key in keys] == list(MIXERS), file


def test_failed_export_leaves_nothing(tmp_path):
    class Broken:
        def save_pretrained(self, path):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export(replace(student(student_of("gla")), tokenizer=Broken()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _set(**values):
    def change(folder: Path):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def _option(**values):
    def change(folder: Path):
        options = json.loads((folder / "config.json").read_text())["options"][0] | values
        _set(options=[{k: v for k, v in options.items() if v != "absent"}])(folder)

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_set(mixer=["mamba"]), r"config.json: mixer=\['mamba'\] should be a list of softmax, linear_attention"),
        (_set(mixer=None), "config.json: mixer=None should be a list of"),
        (_set(options=[]), r"config.json: options=\[\] should be a list of 1 objects, one a mixer"),
        (_set(compute_dtype="int8"), "config.json: compute_dtype='int8' should be one of float32, bfloat16"),
        (_set(mixer=["gla"] * 3, options=[{}] * 3), "config.json: gla has heads=None, expected one of teacher, fla"),
        (_set(num_attention_heads=3), "config.json: num_key_value_heads=2 does not divide num_attention_heads=3"),
        (_option(conv_size="four"), "config.json: gla has conv_size='four', expected an integer"),
        (_option(rope="absent"), "config.json: gla has rope=None, expected one of teacher, own, none"),
        (_option(expand_kv=1), "config.json: gla has expand_kv=1, expected true or false"),
        (_option(decay_range=[1.0]), r"config.json: gla has decay_range=\[1.0\], expected 2 numbers"),
        (_option(new=1), "config.json: MixerOptions has no field 'new': another version wrote the file"),
        (_option(conv_size=3), "k_conv1d.weight has shape .*, but the config makes it"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "model.safetensors is truncated"),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer"),
        (lambda f: (f / "run_card.json").write_text("{}"), "run_card.json has no card: it is damaged"),
    ],
)
def test_damaged_folders(damage, said, tmp_path):
    folder = folder_of(student_of("gla"), tmp_path / "out")
    damage(folder)
    with pytest.raises(UserError, match=said) as error:
        open_student(folder)
    assert "\n" not in str(error.value)


def test_a_student_is_neither_run_nor_teacher(tmp_path):
    folder = folder_of(student_of("gla"), tmp_path / "out")
    with pytest.raises(
        UserError, match=r"out: an exported student, not a run; generate, chat and eval.py take it as --teacher"
    ):
        runs.open_run(folder)
    with pytest.raises(UserError, match=r"a student \(gla\), teachers have softmax attention"):
        student_config(RunConfig(teacher=str(folder)), load_config(str(folder)))


def test_push_leaves_the_folder(tmp_path, monkeypatch):
    folder = folder_of(student_of("gla"), tmp_path / "out")
    before = contents(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"--push some-org/name: not possible \(.*out is complete; upload it") as error:
        push(folder, "some-org/name")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="--push some-org/name: huggingface_hub is not installed"):
        push(folder, "some-org/name")
    assert contents(folder) == before
