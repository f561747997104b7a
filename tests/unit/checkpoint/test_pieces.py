"""Pieces of parameters against brute force: which elements they cover, whether they make up the whole."""

from __future__ import annotations

import math
import random

import numpy as np
from checkpoints import elements_of

from exlm_dist.checkpoint.pieces import Piece, Slice, gap, overlaps, part_shape


def any_shape(dice: random.Random) -> tuple[int, ...]:
    return tuple(dice.randint(1, 5) for _ in range(dice.randint(0, 3)))


def any_piece(dice: random.Random, shape: tuple[int, ...]) -> Piece:
    cut = None
    if shape and dice.random() < 0.7:
        dim = dice.randrange(len(shape))
        cut = Slice(dim, *sorted((dice.randint(0, shape[dim]), dice.randint(0, shape[dim]))))
    size = math.prod(part_shape(shape, cut))
    return Piece(cut, *sorted((dice.randint(0, size), dice.randint(0, size))), 0)


def tiling(dice: random.Random, shape: tuple[int, ...]) -> list[Piece]:
    """Slices along one dimension, or none, each in ranges: as a layout makes them."""
    cuts: list[Slice | None] = [None]
    if shape and dice.random() < 0.7:
        dim = dice.randrange(len(shape))
        edges = [0, *sorted(dice.choices(range(shape[dim] + 1), k=dice.randint(0, 2))), shape[dim]]
        cuts = [Slice(dim, start, stop) for start, stop in zip(edges, edges[1:])]
    pieces = []
    for cut in cuts:
        size = math.prod(part_shape(shape, cut))
        edges = [0, *sorted(dice.choices(range(size + 1), k=dice.randint(0, 3))), size]
        pieces += [Piece(cut, start, stop, rank) for rank, (start, stop) in enumerate(zip(edges, edges[1:]))]
    dice.shuffle(pieces)
    return pieces


def test_overlaps_are_the_elements_that_both_cover():
    dice = random.Random(0)
    for _ in range(2000):
        shape = any_shape(dice)
        target, source = any_piece(dice, shape), any_piece(dice, shape)
        if dice.random() < 0.2:  # two ranges of one slice
            size = math.prod(part_shape(shape, target.slice))
            source = Piece(target.slice, *sorted((dice.randint(0, size), dice.randint(0, size))), 0)
        indices = np.arange(math.prod(shape)).reshape(shape)
        wanted, present = elements_of(indices, target), elements_of(indices, source)
        found = np.full(len(wanted), -1)
        for into, out_of, count in overlaps(shape, target, source):
            assert count > 0 and (found[into : into + count] == -1).all()
            found[into : into + count] = present[out_of : out_of + count]
        assert (found == np.where(np.isin(wanted, present), wanted, -1)).all(), (shape, target, source)


def test_what_makes_up_a_parameter_and_what_does_not():
    dice = random.Random(1)
    faults = 0
    for _ in range(2000):
        shape = any_shape(dice)
        pieces = tiling(dice, shape)
        if dice.random() < 0.5:
            index = dice.randrange(len(pieces))
            pieces[index : index + 1] = [any_piece(dice, shape)] * dice.randint(0, 2)
        count = np.zeros(math.prod(shape), int)
        for piece in pieces:
            np.add.at(count, elements_of(np.arange(count.size).reshape(shape), piece), 1)
        fault = gap(shape, pieces)
        # Tilings by slices that overlap or cross are refused too, though they may cover every element once.
        assert fault is not None or (count == 1).all(), (shape, pieces)
        faults += fault is not None
    assert 500 < faults < 1500


def test_every_tiling_of_a_layout_is_accepted():
    dice = random.Random(2)
    for _ in range(1000):
        shape = any_shape(dice)
        pieces = tiling(dice, shape)
        assert gap(shape, pieces) is None, (shape, pieces)
