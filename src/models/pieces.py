"""Token ids by a T5's own `spiece.model`."""

import re

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerBase, T5Tokenizer


class SentencePieces:
    """Token ids by a T5's own `spiece.model`, equal to those of transformers 3.0.2.

    The tokenizers library reads the same file, but normalizes grapheme by grapheme: it drops a
    mark after a compatibility character (U+FB01 U+0301) and splits at U+0085. It is slower, too.
    """

    def __init__(self, model_file: str, special: dict[str, int]):
        self.model = SentencePieceProcessor(model_file=model_file)
        self._special = special
        self._split = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def encode(self, text: str) -> list[int]:
        """Ids without a final end-of-sequence token. Special tokens in the text are recognised,
        and the spaces around them dropped."""
        parts = self._split.split(text)  # odd ones are special tokens
        ids = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._special[part])
                continue
            part = part.lstrip() if i else part
            part = part.rstrip() if i + 1 < len(parts) else part
            ids += self.model.encode(part) if part.strip() else []
        return ids


def load_pieces(tokenizer: PreTrainedTokenizerBase) -> SentencePieces | None:
    """None unless it is a T5's tokenizer with a `spiece.model` of the same vocabulary: if the
    folder's tokenizer.json has another one, Transformers uses that."""
    file = getattr(tokenizer, "vocab_file", None)
    if not isinstance(tokenizer, T5Tokenizer) or not file or not file.endswith(".model"):
        return None
    special = tokenizer.added_tokens_encoder
    pieces = SentencePieces(file, dict(sorted(special.items(), key=lambda item: -len(item[0]))))
    ids = list(range(len(pieces.model)))
    same = tokenizer.convert_ids_to_tokens(ids) == pieces.model.id_to_piece(ids)
    return pieces if same else None
