"""Log-probabilities and greedy continuations of many token sequences: few shapes, few compilations, any order.

Sequences are sorted by length, padded on the left to one of few lengths (so that all end together), and computed in
batches whose shape follows from that length alone. What stands beside a sequence never changes its result.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlin import generate
from jaxlin.config import ModelConfig, UserError
from jaxlin.evaluation.language_modeling import on_mesh
from jaxlin.model import forward, head_kernel, init_state, project
from jaxlin.runs import Teacher
from jaxlin.sharding import batch_sharding, batch_shards, on_every_device

SHORTEST = 16  # tokens; every padded length is a multiple of it
HALF_STEPS = {"cpu": 48}  # the shortest padded length that is no power of two, by platform
ACCELERATOR_HALF_STEPS = 384  # below, a program more takes longer to compile than it saves
BATCH_TOKENS = {"cpu": 2048}  # padded tokens in a batch, by platform
ACCELERATOR_TOKENS = 32_768
HEAD_TOKENS = 1024  # positions whose logits exist at one time, about 200 MB of float32 for a vocabulary of 50,000
MOST_ROWS = 256  # of a batch that has states, which are all in memory
WORTH_SHARING = {"cpu": 2e12}  # floating-point operations that cost what compiling the programs for it does
ACCELERATOR_SHARING = 1e16

Pair = tuple[Sequence[int], Sequence[int]]
Progress = Callable[[int], None]


class Budget:
    """Padded tokens that a batch may hold: `tokens`, by default what suits the platform. Halved when memory runs out.

    Pass one to several calls, and they remember.
    """

    def __init__(self, tokens: int | None = None) -> None:
        if tokens is not None and tokens < 1:
            raise UserError(f"--batch-tokens {tokens}: must be at least 1")
        self.tokens = tokens or BATCH_TOKENS.get(jax.default_backend(), ACCELERATOR_TOKENS)
        self._said = False

    def rows(self, length: int, shards: int) -> int:
        """Rows of `length` tokens in a batch: a power of two times `shards`."""
        return shards * _power_of_two(self.tokens // (length * shards))

    def halve(self, rows: int, length: int) -> None:
        """After a batch of `rows` rows did not fit."""
        self.tokens = rows * length // 2
        if not self._said:
            print(f"note: {rows} sequences of {length} tokens are too much memory; halving the batch", file=sys.stderr)
        self._said = True


def loglikelihoods(
    model: Teacher,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int | Budget | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """log p(continuation | context) of (context, continuation) pairs, and whether greedy decoding continues so.

    Args:
        model: its config, params and tokenizer (which is not used).
        pairs: token ids; contexts of one token or more, and continuations of one or more.
        batch_tokens: padded tokens in a batch; None suits the platform. A batch that does not fit is halved.
        mesh: where `model.params` are; each batch is spread over it.
        progress: called with the number of pairs that are done, after each batch.

    Raises:
        UserError: not even one sequence fits in memory.
        ValueError: an empty context or continuation, or ids outside the vocabulary.
    """
    _check(pairs, model.config.vocab_size)
    config, params, budget = model.config, generate.serving_params(model.params, model.config), _budget(batch_tokens)
    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)

    def score(members: list[int], chosen: list[int], length: int, rows: int, state: Any = None, of: Any = None) -> None:
        """The pairs `members[i]` for i in `chosen`, or where there is a state, what follows it in its row `of[i]`."""
        which = [members[i] for i in chosen]
        start = 0 if state is None else -1
        batch = _left_aligned([(pairs[i][0][start:], pairs[i][1]) for i in which], length, rows)
        width = min(SHORTEST, _power_of_two(HEAD_TOKENS // rows))
        chunks = np.int32(-(-max(len(pairs[i][1]) for i in which) // width))
        if state is not None:
            index = np.zeros(rows, np.int32)
            index[: len(chosen)] = [of[i] for i in chosen]
            state = _take(state, _place(index, mesh))
        found = _score(config, width, params, *(_place(a, mesh) for a in batch), chunks, state)
        log_probs, hits = np.asarray(found[0], np.float64), np.asarray(found[1])
        for row, i in enumerate(which):
            own = slice(length - len(pairs[i][1]), None)
            results[i] = float(log_probs[row, own].sum()), bool(hits[row, own].all())

    def score_group(groups: list[list[int]], chosen: list[int], length: int, rows: int) -> None:
        """Read each group's context but its last token once; then all its continuations from the state after it."""
        contexts = [(pairs[groups[g][0]][0][:-1], ()) for g in chosen]
        tokens, segment_ids, _ = _left_aligned(contexts, length, rows)
        state = _read(config, params, _place(tokens, mesh), _place(segment_ids, mesh))
        members = [i for g in chosen for i in groups[g]]
        of = [row for row, g in enumerate(chosen) for _ in groups[g]]
        run = functools.partial(score, members, state=state, of=of)
        lengths = [len(pairs[i][1]) for i in members]
        _in_batches(lengths, budget, shards, run, progress, min(MOST_ROWS, 4 * budget.tokens // length))

    shards = _shards(mesh)
    worth = WORTH_SHARING.get(jax.default_backend(), ACCELERATOR_SHARING)
    groups, alone = _share(pairs, worth / (2 * sum(a.size for a in jax.tree.leaves(params))))
    with on_mesh(mesh):
        lengths = [len(pairs[i][0]) + len(pairs[i][1]) - 1 for i in alone]
        _in_batches(lengths, budget, shards, functools.partial(score, alone), progress)
        lengths = [len(pairs[group[0]][0]) - 1 for group in groups]
        _in_batches(lengths, budget, shards, functools.partial(score_group, groups), None, MOST_ROWS)
    return results


def continuations(
    model: Teacher,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop_strings: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    batch_tokens: int | Budget | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Greedy continuations of `prompts`, as token ids, of `max_new_tokens` at most.

    One ends before a token of `stop_ids` (by default those that end a text), and soon after its text holds one of
    `stop_strings`: the caller cuts the text there. Other arguments and errors are those of `loglikelihoods`.
    """
    stops = generate.stop_tokens(model.tokenizer) if stop_ids is None else stop_ids
    answers: list[list[int]] = [[] for _ in prompts]

    recent = generate.BLOCK + max(map(len, stop_strings), default=0)  # tokens that a new stop string can be in

    def finished(tokens: list[int]) -> bool:
        text = model.tokenizer.decode(tokens[-recent:], skip_special_tokens=True)
        return any(stop in text for stop in stop_strings)

    def answer(chosen: list[int], length: int, rows: int) -> None:
        batch = [prompts[i] for i in chosen]
        batch += [batch[-1]] * (rows - len(batch))
        found = generate.generate(
            model.config,
            model.params,
            batch,
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            finished=finished if stop_strings else None,
            pad_to=length,
        )
        for i, tokens in zip(chosen, found, strict=False):
            answers[i] = tokens

    lengths = [len(prompt) for prompt in prompts]
    with on_mesh(mesh):
        _in_batches(lengths, _budget(batch_tokens), _shards(mesh), answer, progress, MOST_ROWS)
    return answers


def padded_length(length: int) -> int:
    """The next of 16, 32, 48, 64, 96, 128, 192, 256, ...: two lengths an octave, so at most half is padding.

    On accelerators one an octave up to 256: the programs of short sequences take longer to compile than to run.
    """
    power = SHORTEST
    while power < length:
        power *= 2
    shorter, least = power * 3 // 4, HALF_STEPS.get(jax.default_backend(), ACCELERATOR_HALF_STEPS)
    return shorter if shorter >= least and length <= shorter else power


def _in_batches(
    lengths: Sequence[int],
    budget: Budget,
    shards: int,
    run: Callable[[list[int], int, int], None],
    progress: Progress | None,
    most_rows: int | None = None,
) -> None:
    """Call run(indices, padded length, rows) over all of `lengths`, the longest first.

    A batch's padded length and rows depend on its longest member only; it is filled with shorter ones, so that one
    batch at most, the last, is not full. Out of memory: halves the budget and repeats the batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        length = padded_length(lengths[order[0]])
        rows = budget.rows(length, shards)
        rows = rows if most_rows is None else min(rows, shards * _power_of_two(most_rows // shards))
        try:
            run(order[:rows], length, rows)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if rows <= shards:
                raise UserError(f"out of memory: a sequence of {length} tokens does not fit") from error
            budget.halve(rows, length)
            continue
        if progress is not None:
            progress(len(order[:rows]))
        order = order[rows:]


def _share(pairs: Sequence[Pair], least: float) -> tuple[list[list[int]], list[int]]:
    """Groups of pairs whose context is read once, and the pairs that stand alone.

    A group shares where that saves half of its tokens; none does unless all together save `least`.
    """
    by_context: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        by_context.setdefault(tuple(context), []).append(i)
    groups, saved = [], 0
    for context, members in by_context.items():
        if len(context) > 1 and len(members) > 1:
            separate = sum(padded_length(len(context) + len(pairs[i][1]) - 1) for i in members)
            together = padded_length(len(context) - 1) + sum(padded_length(len(pairs[i][1])) for i in members)
            if 2 * together <= separate:
                groups.append(members)
                saved += separate - together
    if saved < least:
        return [], list(range(len(pairs)))
    shared = {i for members in groups for i in members}
    return groups, [i for i in range(len(pairs)) if i not in shared]


def _left_aligned(pairs: Sequence[Pair], length: int, rows: int) -> tuple[np.ndarray, ...]:
    """tokens, segment ids and labels, [rows, length]: each row ends with its sequence's last token but one.

    Without a continuation it ends with the context's last token.
    """
    tokens, segment_ids, labels = np.zeros((3, rows, length), np.int32)
    for row, (context, continuation) in enumerate(pairs):
        after = continuation if len(continuation) else (0,)
        sequence = np.concatenate([np.asarray(context, np.int32), np.asarray(after, np.int32)])
        tokens[row, length - len(sequence) + 1 :] = sequence[:-1]
        labels[row, length - len(sequence) + 1 :] = sequence[1:]
        segment_ids[row, length - len(sequence) + 1 :] = 1
    return tokens, segment_ids, labels


@jax.jit(static_argnums=0)
def _read(config: ModelConfig, params, tokens, segment_ids):
    """The state after tokens [B, T]."""
    state = init_state(config, *tokens.shape)
    return forward(config, params, tokens, segment_ids=segment_ids, state=state, logits=False).state


@jax.jit
def _take(state, rows):
    """Rows of a state; its layers' arrays are stacked before the batch."""
    return {"position": state["position"][rows], "layers": jax.tree.map(lambda a: a[:, rows], state["layers"])}


@jax.jit(static_argnums=(0, 1))
def _score(config: ModelConfig, width: int, params, tokens, segment_ids, labels, chunks, state):
    """Log-probability of each label, and whether it is the likeliest, [B, T]; the last `chunks` * `width` columns only.

    `state` is what came before the tokens, or None. The logits of `width` columns exist at one time.
    """
    hidden = forward(config, params, tokens, segment_ids=segment_ids, state=state, logits=False).hidden
    kernel = head_kernel(params)

    def step(i, found):
        start = hidden.shape[1] - (i + 1) * width
        part, target = (jax.lax.dynamic_slice_in_dim(a, start, width, axis=1) for a in (hidden, labels))
        logits = project(part, kernel, config)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        new = picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == target
        return tuple(jax.lax.dynamic_update_slice_in_dim(a, b, start, 1) for a, b in zip(found, new, strict=True))

    nothing = jnp.zeros(labels.shape, jnp.float32), jnp.zeros(labels.shape, bool)
    return on_every_device(jax.lax.fori_loop(0, chunks, step, nothing))


def _check(pairs: Sequence[Pair], vocab_size: int) -> None:
    for i, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(f"pairs: {'context' if not len(context) else 'continuation'} {i} is empty")
        low, high = (f(f(context), f(continuation)) for f in (min, max))
        if low < 0 or high >= vocab_size:
            raise ValueError(f"pairs: ids {low} to {high} of pair {i} are not in a vocabulary of {vocab_size}")


def _budget(batch_tokens: int | Budget | None) -> Budget:
    return batch_tokens if isinstance(batch_tokens, Budget) else Budget(batch_tokens)


def _shards(mesh: jax.sharding.Mesh | None) -> int:
    return 1 if mesh is None else batch_shards(mesh)


def _place(array: np.ndarray, mesh: jax.sharding.Mesh | None) -> Any:
    if mesh is None:
        return array
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), array.__getitem__)


def _power_of_two(n: int) -> int:
    """The largest power of two up to `n`, 1 at least."""
    return 1 << max(n, 1).bit_length() - 1
