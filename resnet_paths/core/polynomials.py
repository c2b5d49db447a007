"""Polynomials that count paths, in exact integers: coefficient k is the number of paths of length k.

Blocks in series multiply. Most blocks of a chain have the same polynomial, 1 + t, so that the product has a few factors
to high powers, and its coefficients follow from one another: with P = p_1^m_1 p_2^m_2 ... and Q = p_1 p_2 ...,

    Q P' = R P,    R = sum_i m_i p_i' Q / p_i,

is a linear recurrence of the order of Q's degree (Knuth, The Art of Computer Programming 2, section 4.7). Of n residual
blocks it is that of the binomials. Each coefficient takes a few products of a long integer with a short one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

import pandas as pd

__all__ = ["lengths_of_product", "multiplied", "product_of_powers", "shown_count", "with_counts_as_text"]


def multiplied(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """The product of two polynomials, lowest coefficient first.

    Args:
        one: Coefficients.
        other: Coefficients.

    Returns:
        Coefficients of the product, exact ints.

    Example:
        >>> multiplied([1, 1], [1, 2, 1])
        [1, 3, 3, 1]
    """
    product = [0] * (len(one) + len(other) - 1)
    for i, a in enumerate(one):
        if a:
            for j, b in enumerate(other):
                product[i + j] += a * b
    return product


def product_of_powers(factors: Mapping[tuple[int, ...], int]) -> list[int]:
    """The product of powers of polynomials whose coefficients are at least 0.

    Args:
        factors: The exponent, at least 0, of each polynomial; no polynomial is 0.

    Returns:
        Coefficients, lowest first, without zeros at the end.

    Example:
        >>> product_of_powers({(1, 1): 4}), product_of_powers({(0, 1): 2, (1, 2): 1})
        ([1, 4, 6, 4, 1], [0, 0, 1, 2])
    """
    # Powers of t are taken out, so that the recurrence can start at the constant term; constants too.
    lowest, scale, rest = 0, 1, dict[tuple[int, ...], int]()
    for factor, exponent in factors.items():
        zeros = next(k for k, coefficient in enumerate(factor) if coefficient)
        lowest += zeros * exponent
        proper = tuple(factor[zeros : max(k for k, coefficient in enumerate(factor) if coefficient) + 1])
        if len(proper) == 1:
            scale *= proper[0] ** exponent
        elif exponent:
            rest[proper] = rest.get(proper, 0) + exponent
    start = scale * math.prod(factor[0] ** exponent for factor, exponent in rest.items())
    degree = sum((len(factor) - 1) * exponent for factor, exponent in rest.items())
    together, derived = [1], [0]
    for factor, exponent in rest.items():
        # R of the factors so far: (R Q)' as of a product.
        slope = [exponent * k * coefficient for k, coefficient in enumerate(factor)][1:]
        derived = _sum(multiplied(derived, factor), multiplied(together, slope))
        together = multiplied(together, factor)
    return [0] * lowest + _solved(together, derived, start, degree)


def _solved(q: Sequence[int], r: Sequence[int], start: int, degree: int) -> list[int]:
    """Coefficients up to t^degree of the polynomial P with ``Q P' = R P`` that begins with `start`."""
    found = [start]
    for k in range(degree):
        # Coefficient of t^k on both sides; that of t^(k + 1) in P is the one unknown.
        total = 0
        for j in range(min(k + 1, max(len(q) - 1, len(r)))):
            ahead = q[j + 1] * (k - j) if j + 1 < len(q) else 0
            total += ((r[j] if j < len(r) else 0) - ahead) * found[k - j]
        found.append(total // (q[0] * (k + 1)))
    return found


def _sum(one: Sequence[int], other: Sequence[int]) -> list[int]:
    longer, shorter = (one, other) if len(one) > len(other) else (other, one)
    return [a + (shorter[k] if k < len(shorter) else 0) for k, a in enumerate(longer)]


def lengths_of_product(factors: Mapping[tuple[int, ...], int], of_others: int = 1) -> int:
    """Which coefficients of a product of powers are not 0, for coefficients of at least 0.

    Args:
        factors: As for `product_of_powers`.
        of_others: The same of another factor.

    Returns:
        An int whose bit k is set if coefficient k is not 0.

    Example:
        >>> bin(lengths_of_product({(1, 0, 1): 2}))
        '0b10101'
    """
    lengths = of_others
    for factor, exponent in factors.items():
        shifts = [k for k, coefficient in enumerate(factor) if coefficient]
        if shifts == list(range(shifts[0], shifts[-1] + 1)):
            # Without gaps: the sum of that many numbers from the first to the last.
            lengths = _spread(lengths, (shifts[-1] - shifts[0]) * exponent) << shifts[0] * exponent
            continue
        for _ in range(exponent):
            lengths = _union(lengths << shift for shift in shifts)
    return lengths


def _spread(bits: int, most: int) -> int:
    """The union of the bits shifted by 0, 1, ... `most`."""
    done = 0
    while done < most:
        step = min(done + 1, most - done)
        bits |= bits << step
        done += step
    return bits


def _union(sets: Iterable[int]) -> int:
    union = 0
    for bits in sets:
        union |= bits
    return union


def shown_count(count: int) -> str:
    """A number of paths for people: all digits up to 10^30, else the first three and the power of ten.

    Args:
        count: At least 0, of any size.

    Returns:
        Text.

    Example:
        >>> shown_count(2**20), shown_count(2**50_000)
        ('1,048,576', '3.16e+15051')
    """
    if count < 10**30:
        return f"{count:,}"
    # math.log10 takes ints of any size; Python refuses to convert those of more than 4300 digits to text.
    power, rest = divmod(math.log10(count), 1)
    return f"{10**rest:.2f}e+{power:.0f}"


def with_counts_as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame of counts that can be written to a file, whatever their size.

    Python refuses to convert integers of more than 4300 digits to text, so that pandas does as well.

    Args:
        frame: A frame, such as that of `resnet_paths.path_histogram`.

    Returns:
        A frame with the text of all digits in place of integers beyond 64 bits.
    """

    def written(value: object) -> object:
        return str(Decimal(value)) if isinstance(value, int) and value.bit_length() > 64 else value

    frame = frame.copy()
    for position, dtype in enumerate(frame.dtypes):
        if pd.api.types.is_object_dtype(dtype):
            values = pd.Series([written(value) for value in frame.iloc[:, position]], index=frame.index, dtype=object)
            frame.isetitem(position, values)  # type: ignore[arg-type]  # the stubs do not know of Series
    return frame
