"""Damages of files, drawn from `random`, whose seed every test's report has."""

from __future__ import annotations

import random


def mutated(data: bytes, others: list[bytes]) -> bytes:
    """`data` after one to four damages; parts of `others` may be put into it."""
    damaged = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = (
            random.randrange(len(damaged) + 1)
            if random.random() < 0.5
            else random.randrange(min(len(damaged), 200) + 1)
        )
        match random.randrange(7):
            case 0:
                damaged[at : at + 1] = random.randbytes(1)
            case 1:  # a size that is absurd
                size = random.choice([0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF]).to_bytes(4, "big")
                damaged[at : at + 4] = random.choice([size, size[::-1], size[2:], size[:1:-1]])
            case 2:
                del damaged[at:]
            case 3:
                del damaged[at : at + random.randint(1, 600)]
            case 4:
                damaged[at:at] = random.randbytes(random.randint(1, 600))
            case 5:
                damaged[at : at + 600] = bytes(600)
            case _:
                other = random.choice(others)
                damaged[at:] = other[random.randrange(len(other) + 1) :]
    return bytes(damaged)
