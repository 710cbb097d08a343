"""Images as runs of one token: tokenised quickly, with the result of the whole text."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AddedToken, PreTrainedTokenizerFast

from pipeline.image_runs import _RunTokenizer
from tests.tiny_models import tiny_tokenizer

IMAGE = "<image>"
PIECES = ["What ", " is", "\n", "  ", "é漢", "<im", "age>", "<s>", "</s>", "<tile>", IMAGE]


def word_tokenizer(**image: Any) -> PreTrainedTokenizerFast:
    """Lower case, sentencepiece's mark at the text's beginning, and both ends marked."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz ▁<>\né/"))
    vocabulary = {"<unk>": 0} | {letter: number for number, letter in enumerate(letters, 1)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["<s>", "</s>"])
    core.add_special_tokens([AddedToken("<tile>", lstrip=True, rstrip=True, special=True)])
    core.add_tokens([AddedToken(IMAGE, **{"special": True, "normalized": False} | image)])
    ends = [(name, core.token_to_id(name)) for name in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def short(tokenizer: PreTrainedTokenizerFast) -> _RunTokenizer | None:
    return _RunTokenizer.of(tokenizer, tokenizer.convert_tokens_to_ids(IMAGE))


TOKENIZERS = {"bytes": tiny_tokenizer(), "words": word_tokenizer()}
KINDS = {kind: (tokenizer, short(tokenizer)) for kind, tokenizer in TOKENIZERS.items()}


def assert_equal(
    tokenizer: PreTrainedTokenizerFast, faster: _RunTokenizer | None, text: str, **options: Any
) -> None:
    assert faster is not None
    ours, theirs = faster([text], **options), tokenizer([text], **options)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert len(ours[name]) == 1
        np.testing.assert_array_equal(ours[name][0], value[0])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PIECES) | st.integers(16, 40).map(IMAGE.__mul__), max_size=8),
    special=st.booleans(),
    offsets=st.booleans(),
)
def test_the_result_is_that_of_the_whole_text(
    kind: str, parts: list[str], special: bool, offsets: bool
) -> None:
    text = "".join(parts)
    assert_equal(*KINDS[kind], text, add_special_tokens=special, return_offsets_mapping=offsets)


def test_a_run_is_tokenised_as_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    faster, seen = short(tokenizer), []
    own = type(tokenizer).__call__

    def watched(self: Any, text: Any, **options: Any) -> Any:
        seen.append(text)
        return own(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    found = faster([f"a {IMAGE * 729} b {IMAGE * 15} c {IMAGE * 16}"])
    assert seen == [[f"a {IMAGE} b {IMAGE * 15} c {IMAGE}"]]
    assert found["input_ids"][0].count(tokenizer.convert_tokens_to_ids(IMAGE)) == 729 + 15 + 16
    faster([IMAGE * 20], truncation=True, max_length=4)  # an option that might not go with it
    faster([f"{IMAGE * 20}"], text_pair=["b"])
    assert seen[1:] == [[IMAGE * 20]] * 2


def test_two_tokens_that_overlap_are_left_to_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("b<im", normalized=False), AddedToken("age>\n", normalized=False)])
    for text in (f"b{IMAGE * 20}", f"{IMAGE * 20}\n", f"b{IMAGE * 20} {IMAGE * 20}"):
        assert_equal(tokenizer, short(tokenizer), text, return_offsets_mapping=True)


@pytest.mark.parametrize(
    "image", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}]
)
def test_a_token_that_looks_beside_itself_is_left_to_the_tokenizer(image: dict[str, bool]) -> None:
    assert short(word_tokenizer(**image)) is None


def test_other_tokenizers_are_left_alone() -> None:
    tokenizer = tiny_tokenizer()
    assert _RunTokenizer.of(tokenizer, tokenizer.convert_tokens_to_ids("A")) is None  # not an added token
    longer = tiny_tokenizer()
    longer.add_tokens([AddedToken(IMAGE * 2, normalized=False)])
    assert short(longer) is None

    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, **options: Any) -> Any:
            return super()._encode_plus([part.replace(IMAGE * 300, "") for part in text], **options)

    own = Own(tokenizer_object=tokenizer.backend_tokenizer)
    assert short(own) is None
