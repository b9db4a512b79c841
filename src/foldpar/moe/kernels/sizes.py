"""How launchers cut sizes, on the host; Triton's own functions for it take some microseconds each."""

__all__ = ["ceil_div", "power_of_2"]


def power_of_2(number: int) -> int:
    """The first one from ``number`` on.

    >>> power_of_2(1), power_of_2(8), power_of_2(9)
    (1, 8, 16)
    """
    return 1 << (number - 1).bit_length()


def ceil_div(number: int, divisor: int) -> int:
    """How many parts of a size there are, the last one maybe shorter.

    >>> ceil_div(8, 4), ceil_div(9, 4), ceil_div(0, 4)
    (2, 3, 0)
    """
    return -(-number // divisor)
