"""CLIP: a causal text tower that pools at the end token."""

from __future__ import annotations

from typing import Any, ClassVar

from keeplora.errors import KeepLoraError
from keeplora.models.dual_encoder import DualEncoder


class CLIP(DualEncoder):
    """`transformers.CLIPModel`. Prompts are padded to the longest, not to 77: pads come after the end token, where a
    causal tower cannot see them, so the features are the same at a fraction of the cost."""

    family: ClassVar[str] = "clip"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_end_token()

    @property
    def _pooled_token(self) -> Any:
        """The token at whose first position the text tower pools; 2 stands for the highest id."""
        return self.text_config.eos_token_id

    def _check_end_token(self) -> None:
        """Refuse a tokenizer whose end token is not the position that the model pools.

        transformers pools at the first `config.eos_token_id`, and where that token is missing silently at position 0,
        which in a causal tower is the same for every text. With the old default (2) it pools at the highest id.
        """
        ids = self.tokenizer("a")["input_ids"]
        pooled, end, pad = self._pooled_token, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        mend = f"set text_config.eos_token_id to {end} in its config.json"
        if pooled == 2 and end != 2:
            if ids[-1] != max(ids) or (pad is not None and pad > max(ids)):
                raise KeepLoraError(
                    f"{self.name}: its config pools texts at the highest token id (eos_token_id is 2), but the end "
                    f"token {end} of its tokenizer is not the highest of a padded text (the pad token is {pad}); {mend}"
                )
        elif pooled not in ids:
            raise KeepLoraError(
                f"{self.name}: its config pools texts at token {pooled}, which its tokenizer never writes (its end "
                f"token is {end}), so that every text would get the same features; {mend}"
            )
