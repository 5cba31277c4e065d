"""jaxlin models for lm-eval-harness (Gao et al., version 0.4.13): importing this module registers `--model jaxlin`.

Command: `python -m jaxlin.evaluation.harness --model jaxlin --model_args run=DIR --tasks ...`, with the arguments of
`lm_eval`. The harness's own command finds the models of its own package only: 0.4.13 has no plug-ins for models.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models import utils as models_utils  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from jaxlin import generate
from jaxlin.command_line import run_main
from jaxlin.config import UserError
from jaxlin.evaluation.scoring import Budget, Progress, continuations, loglikelihoods
from jaxlin.runs import Teacher

MAX_NEW_TOKENS = 256  # the harness's default


@register_model("jaxlin")
class JaxLM(TemplateLM):
    """A teacher or student. Texts become tokens, are cut, and generations end, as in the harness's own `hf` model.

    Args:
        run, teacher, teacher_model: what to load, as the flags of `jaxlin.generate`.
        model: instead, a model that is already loaded.
        batch_tokens: padded tokens in a batch; None suits the device. What the harness calls batch_size has no effect.
        max_length: tokens of context and continuation; None takes the model's max_position_embeddings.
        add_bos_token: put the beginning-of-sequence token first; None leaves it to the tokenizer.
        mesh: where the parameters of `model` are.
        bar: starts a progress bar; None shows the harness's own.
    """

    def __init__(
        self,
        run: str = "",
        teacher: str = "",
        *,
        teacher_model: bool = False,
        model: Teacher | None = None,
        batch_tokens: int | Budget | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        mesh: Any = None,
        bar: Callable[[str, int], Progress] | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = "run, teacher, teacher_model, batch_tokens, max_length or add_bos_token"
            raise UserError(f"--model_args {next(iter(unknown))}: unknown; give {known}")
        self.model = model or generate.load_model(str(run), str(teacher), teacher_model=teacher_model)
        self.tokenizer = self.model.tokenizer
        self.max_length = max_length or self.model.config.max_position_embeddings
        self._budget = batch_tokens if isinstance(batch_tokens, Budget) else Budget(batch_tokens)
        self._add_bos_token = add_bos_token
        self._mesh = mesh
        self._bar = bar

    # ---- tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text without context is predicted from."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, with the special tokens that the tokenizer adds, unless the text begins with one."""
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token
            if models_utils.has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
                add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, verbose=False, **special)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt; without a generation prompt its last message is left open."""
        if not self.tokenizer.chat_template:
            raise UserError("the model's tokenizer has no chat template")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # ---- requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p(continuation | context) of each request, and whether greedy decoding gives the continuation."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self._bar is not None)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        results = self._score(pairs, "scoring", disable_tqdm)
        for (key, _, _), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p(text) of each request, in windows of `max_length` tokens that predict every token once."""
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            for request in requests
        ]
        scores = iter(self._score([pair for pairs in windows for pair in pairs], "scoring", disable_tqdm))
        results = [sum(next(scores)[0] for _ in pairs) for pairs in windows]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each request, up to the first of its stop strings, which is left out."""
        arguments: list[tuple[Any, ...]] = [request.args for request in requests]
        groups: dict[str, list[int]] = {}
        for i, (_, settings) in enumerate(arguments):
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append(i)
        results = [""] * len(requests)
        progress = self._progress("answering", len(requests), disable_tqdm)
        for key, members in groups.items():
            texts = self._generate([arguments[i][0] for i in members], json.loads(key), progress)
            for i, text in zip(members, texts, strict=True):
                results[i] = text
                self.cache_hook.add_partial("generate_until", arguments[i], text)
        return results

    def _generate(self, contexts: list[str], settings: dict[str, Any], progress: Progress) -> list[str]:
        settings = dict(models_utils.normalize_gen_kwargs(settings, MAX_NEW_TOKENS))
        if settings["do_sample"]:
            raise UserError("the task asks for sampling (do_sample): jaxlin's harness model decodes greedily only")
        most = settings["max_gen_toks"]
        if most >= self.max_length:
            raise UserError(f"the task wants {most} new tokens, but the model's max_length is {self.max_length}")
        stops = [stop for stop in settings["until"] if stop]
        prompts = [self.tok_encode(context)[-(self.max_length - most) :] for context in contexts]
        answers = continuations(
            self.model,
            [prompt or [self.prefix_token_id] for prompt in prompts],
            most,
            stop_strings=stops,
            stop_ids=(self.eot_token_id,),
            batch_tokens=self._budget,
            mesh=self._mesh,
            progress=progress,
        )
        texts = [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        return [models_utils.postprocess_generated_text(text, stops, None) for text in texts]

    def _score(self, pairs, title: str, quiet: bool) -> list[tuple[float, bool]]:
        progress = self._progress(title, len(pairs), quiet)
        return loglikelihoods(self.model, pairs, batch_tokens=self._budget, mesh=self._mesh, progress=progress)

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The end of the context that leaves room for the continuation."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens: the model's max_length is {self.max_length}"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def _progress(self, title: str, total: int, quiet: bool) -> Progress:
        if self._bar is not None:
            return self._bar(title, total)
        from tqdm import tqdm

        bar = tqdm(total=total, desc=title, disable=quiet)

        def advance(done: int) -> None:
            bar.update(done)

        return advance


def main() -> None:
    """The harness's own command line, with `--model jaxlin`."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports] -- of the extra eval

    cli_evaluate()


if __name__ == "__main__":
    run_main(main)
