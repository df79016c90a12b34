"""A target as lm_eval's model: its texts become tokens here, by the rules of the target's own tokenizer.

The rules are those of lm_eval's `hf` model, so that both are asked the same: special tokens are added as the tokenizer
adds them, unless the text already begins with the first one; an empty context is the beginning of text, or its end
where there is none; what does not fit loses its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.tokenizer_files import rendered
from tpvc.compiler.harness.scorer import open_scorer
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.tuning.examples import Encoded

KNOWN = {"until", "max_gen_toks", "do_sample", "temperature"}
"""What a task may ask of generation."""
DRAWS = {"top_p", "top_k", "min_p", "typical_p"}
"""What else it may ask of greedy decoding, to which these mean nothing."""
NEUTRAL = {"top_p": 1.0, "top_k": 0, "num_beams": 1, "repetition_penalty": 1.0}
"""And what never means anything."""


@register_model("tpvc")
class TpvcLM(TemplateLM):
    """target, adapter, task, threads: as `tpvc eval` takes them. `batch_size`, `max_batch_size` and `device`, which
    lm_eval hands to every model, are not heeded: batches are as large as the lengths allow.

    cut  questions so far that were longer than the model's context and lost their beginning
    """

    def __init__(
        self,
        target: str | Path,
        adapter: str | None = None,
        task: str | None = None,
        threads: int | None = None,
        progress: Progress = silent,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        progress("load", 0, 1, str(target))
        self.scorer = open_scorer(str(target), adapter, task, threads)
        self.tokenizer = self.scorer.tokenizer
        self.name, self.progress, self.cut = str(target), progress, 0
        progress("load", 1, 1, "")

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Of the token before a text that has nothing else before it."""
        first = self.tokenizer.bos_token_id
        first = self.eot_token_id if first is None else first
        if first is None:
            raise TpvcError(
                f"the tokenizer of {self.name} has no token that begins or ends a text; these tasks need one"
            )
        return first

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; None: as the tokenizer does, and nothing before a text that begins with its first token."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return rendered(self.tokenizer, chat_history, tokenize=False, **ends)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, would greedy decoding write it?) of every (texts, context, continuation)."""
        questions, stage = [self._question(*request[1:]) for request in requests], f"score {Path(self.name).name}"
        self.progress(stage, 0, len(questions), "answers")
        found = self.scorer.verdicts(questions, lambda done: self.progress(stage, done, len(questions), "answers"))
        for (texts, _, _), verdict in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, verdict)
        return found

    def _question(self, context: list[int], continuation: list[int]) -> Encoded:
        """The last context_length + 1 tokens: the very last is predicted and never read."""
        ids, room = [*(context or [self.prefix_token_id]), *continuation], self.scorer.context_length
        if not continuation or len(continuation) > room:
            raise TpvcError(
                f"a task asks about a continuation of {len(continuation)} tokens; {self.name} can judge 1 to {room}"
            )
        self.cut += len(ids) > room + 1
        ids = ids[-(room + 1) :]
        return Encoded(tuple(ids), len(ids) - len(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in windows of the model's context; every token counts once."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.scorer.context_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        found = [0.0] * len(requests)
        for i, (chance, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            found[i] += chance
        for request, chance in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, chance)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the target writes, up to the first of the task's stop texts or an end of text. Greedy, or by temperature
        with the request's number as the seed."""
        found = []
        for i, request in enumerate(requests):
            context, asked = request.args
            written = self._write(context, asked, i)
            self.cache_hook.add_partial("generate_until", (context, asked), written)
            found.append(written)
            self.progress(f"write {Path(self.name).name}", i + 1, len(requests), "texts")
        return found

    def _write(self, context: str, asked: dict[str, Any], seed: int) -> str:
        options = normalize_gen_kwargs(asked, 256)
        temperature = options.get("temperature") or 0.0
        taken = KNOWN if temperature else KNOWN | DRAWS
        strange = [k for k, v in options.items() if k not in taken and v is not None and NEUTRAL.get(k) != v]
        if strange:
            raise TpvcError(
                f"a task asks for {strange[0]}={options[strange[0]]}; {self.name} writes greedily or by temperature"
            )
        new, room = options["max_gen_toks"], self.scorer.context_length
        if new >= room:
            raise TpvcError(
                f"a task asks for up to {new} new tokens, the context of {self.name} holds {room}; lower max_gen_toks"
                " in its task file"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.cut += len(ids) > room - new
        stops = [stop for stop in options["until"] if stop]
        tokens: list[int] = []
        text = ""
        for token in self.scorer.generate(ids[-(room - new) :], new, temperature, seed):
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if any(stop in text for stop in stops):
                break
        return postprocess_generated_text(text, stops, None)
