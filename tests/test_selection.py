"""Layer specifications resolve to the indices that the papers name."""

import pytest

from layerfuse.selection import resolve_layer, select


@pytest.mark.parametrize(
    ("spec", "depth", "groups"),
    [
        ("3,18,-2", 24, ((3,), (18,), (23,))),
        ([23, 7, 15], 24, ((23,), (7,), (15,))),
        (-1, 12, ((12,),)),
        (0, 12, ((0,),)),
        ("-1", 27, ((27,),)),
        ("former", 24, (tuple(range(1, 13)),)),
        ("latter", 24, (tuple(range(13, 25)),)),
        ("all", 24, (tuple(range(1, 13)), tuple(range(13, 25)))),
        ("all", 27, (tuple(range(1, 14)), tuple(range(14, 28)))),
        ("former", 26, (tuple(range(1, 14)),)),
        ("every:4", 12, ((4,), (8,), (12,))),
        ("every:4", 26, ((2,), (6,), (10,), (14,), (18,), (22,), (26,))),
        ("0-11|12-23", 24, (tuple(range(12)), tuple(range(12, 24)))),
        ("1-3", 12, ((1,), (2,), (3,))),
        ([[1, 2], [3, -1]], 4, ((1, 2), (3, 4))),
    ],
)
def test_specifications(spec: object, depth: int, groups: tuple[tuple[int, ...], ...]) -> None:
    selection = select(spec, depth)  # type: ignore[arg-type]
    assert selection.groups == groups
    assert selection.layers == tuple(k for group in groups for k in group)


def test_llava_names_of_clip_layers() -> None:
    """-1 -> 24, -2 -> 23, -7 -> 18, -12 -> 13, -17 -> 8, -22 -> 3."""
    found = [resolve_layer(k, 24) for k in (-1, -2, -7, -12, -17, -22, -25)]
    assert found == [24, 23, 18, 13, 8, 3, 0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("25", "layers are 0..24"),
        (-26, "-25..-1"),
        ("3,3", r"\[3\] are selected more than once"),
        ("3,-22", r"\[3\] are selected more than once"),
        ("middle", "cannot read 'middle'"),
        ("", "cannot read ''"),
        ("5-2", "cannot read '5-2'"),
        ("every:0", "cannot read"),
        ([], "no layer is selected"),
        ([[1], []], "no layer is selected"),
    ],
)
def test_bad_specifications(spec: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(spec, 24)  # type: ignore[arg-type]
