"""Saved sessions: they continue bit for bit, with the model that wrote them alone, and are never half-written."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlin.config import UserError
from jaxlin.model import layers_together
from jaxlin.sampling import Sampling
from jaxlin.session import Session, serving_params
from jaxlin.session_file import fingerprint
from tests.models import TEACHER, random_params, student_of

WARM = Sampling(1.0, repetition_penalty=1.3)


def make(mixer="gated_deltanet", **changes):
    config = student_of(mixer, teacher=replace(TEACHER, **changes))
    return config, serving_params(random_params(config), config)


@pytest.mark.parametrize("mixer, dtype", [("mlstm+softmax", "bfloat16"), ("gated_deltanet", "float32")])
def test_continues_bit_for_bit(tmp_path, mixer, dtype):
    """After a prompt, some tokens and more to read; the cache of softmax attention grows after it was loaded."""
    model = make(mixer, dtype=dtype)
    session = Session(*model, seed=5, room=32)
    session.read(list(range(20)))
    list(session.stream(WARM, 3))
    session.save(tmp_path / "new" / "state")
    loaded = Session.load(tmp_path / "new" / "state", *model)
    assert loaded.length == session.length == 23
    expected = list(session.stream(WARM, 12))
    assert list(loaded.stream(WARM, 12)) == expected
    for one in (session, loaded):
        one.read([1, 2, 3])
    np.testing.assert_array_equal(loaded.logits, session.logits)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["state"]


@pytest.mark.parametrize("mixer", ["mlstm+softmax", "gated_deltanet"])
def test_layers_apart(tmp_path, mixer):
    """The same tokens and states without a loop over layers, which a saved session does not see."""
    config = student_of(mixer)
    params = random_params(config)
    apart, together = serving_params(params, config, unroll=True), serving_params(params, config)
    assert "layers" not in apart and "layers_0" in apart
    jax.tree.map(np.testing.assert_array_equal, layers_together(apart), together)
    assert fingerprint(apart) == fingerprint(together)
    session = Session(config, together, seed=5)
    session.read(list(range(20)))
    session.save(tmp_path / "state")
    unrolled = Session.load(tmp_path / "state", config, apart)
    assert list(unrolled.stream(WARM, 8)) == list(session.stream(WARM, 8))
    np.testing.assert_allclose(unrolled.logits, session.logits, rtol=1e-5, atol=1e-5)
    unrolled.read([3, 1, 2])
    session.read([3, 1, 2])
    np.testing.assert_allclose(unrolled.logits, session.logits, rtol=1e-5, atol=1e-5)


def test_before_the_first_token(tmp_path):
    model = make()
    Session(*model, seed=2).save(tmp_path / "state")
    loaded, new = Session.load(tmp_path / "state", *model), Session(*model, seed=2)
    for one in (loaded, new):
        one.read([1])
    assert list(loaded.stream(WARM, 5)) == list(new.stream(WARM, 5))


def test_fields_that_older_files_lack():
    """They are written only where they are set, so that what was kept before there were any is still known."""
    assert not {"qk_norm", "attention_out_bias"} & TEACHER.described().keys()
    assert replace(TEACHER, qk_norm=True).described() == TEACHER.described() | {"qk_norm": True}


def test_what_cannot_be_loaded(tmp_path):
    config, params = make()
    path = tmp_path / "state"
    with pytest.raises(UserError, match=f"--load-state {path}: no file there"):
        Session.load(path, config, params)
    session = Session(config, params)
    session.read([1, 2])
    session.save(path)
    good = path.read_bytes()

    other = make("deltanet")
    with pytest.raises(
        UserError, match=r"was saved by another model \(mixer \['gated_deltanet'\], here \['deltanet'\]\)"
    ):
        Session.load(path, *other)
    with pytest.raises(UserError, match=r"another model .rms_norm_eps 1e-05, here 1e-06"):
        Session.load(path, replace(config, rms_norm_eps=1e-6), params)
    moved = jax.tree.map(lambda a: a, params)
    kernel = moved["layers"]["block_0"]["mlp"]["up_proj"]["kernel"]
    moved["layers"]["block_0"]["mlp"]["up_proj"]["kernel"] = kernel[:, ::-1]
    with pytest.raises(UserError, match="with other parameters"):
        Session.load(path, config, moved)

    for place in (5, len(good) // 3, len(good) - 5):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(UserError, match=r"is damaged|no saved session"):
            Session.load(path, config, params)
    for content in (good[:-7], good[:100], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged, or no saved session"):
            Session.load(path, config, params)


def test_what_cannot_be_saved(tmp_path):
    session = Session(*make())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--save-state .*: cannot be written"):
        session.save(tmp_path / "file" / "state")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"--save-state .*: cannot be written"):
        session.save(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
