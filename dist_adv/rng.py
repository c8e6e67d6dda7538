"""Counter-based random numbers: (seed, stream, step, sample) -> bits, the same on every device.

Nothing here has a state. A number depends on what it is for, never on which rank asks or on what
was drawn before, so a run gives the same numbers at any world size and after any resume. The
generator is SplitMix64 (Steele, Lea, Flood 2014): one 64-bit finaliser over a Weyl sequence. It
is exact integer arithmetic, hence bit for bit the same on CPU and GPU. Only `normal` goes on from
there by a function, the inverse error function in float64, whose last place may differ between
devices: as float32 its numbers are the same but for a rare last place.
"""

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """Return the int64 with the bits of `value` modulo 2**64."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)
_TOP_24 = _signed(((1 << 24) - 1) << 40)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's >> on int64 copies the sign bit."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit integers with full avalanche."""
    z = _nearly_mixed(z)
    return z.bitwise_xor_(_shifted(z, 31))


def _nearly_mixed(z: Tensor) -> Tensor:
    """Mix but for the last shift, which leaves the upper 31 bits as they are."""
    z = (z ^ _shifted(z, 30)).mul_(_MULTIPLY_1)
    return z.bitwise_xor_(_shifted(z, 27)).mul_(_MULTIPLY_2)


def stream_key(*parts: int | str) -> int:
    """Return a 64-bit key (as int64) from the seed, the name of a stream, the step, ..."""
    text = "\x1f".join(map(str, parts)).encode()
    return _signed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


def sample_keys(key: int, samples: Tensor) -> Tensor:
    """One 64-bit key a sample: int64 (n,) -> int64 (n,)."""
    return _mix(samples * _signed(_GOLDEN) + key)


def substream(keys: Tensor, name: str) -> Tensor:
    """Independent keys for another use of the same samples, such as a second restart."""
    return _mix(keys ^ stream_key(name))


def bits(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """64 random bits an element: int64 (n, *shape) from keys (n,)."""
    return _mix(_states(keys, shape))


@lru_cache(maxsize=4)
def _counter(numbers: int, device: torch.device) -> Tensor:
    """Return the Weyl sequence, the same for every batch; nobody changes it in place."""
    return torch.arange(1, numbers + 1, device=device) * _signed(_GOLDEN)


def _states(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the states of the generator that are mixed: int64 (n, *shape) from keys (n,)."""
    counter = _counter(math.prod(shape), keys.device)
    return (keys[:, None] + counter).view(len(keys), *shape)


def uniform(keys: Tensor, shape: tuple[int, ...], width: float = 1.0) -> Tensor:
    """Float32 (n, *shape), uniform on the 2**24 multiples of 2**-24 in [0, 1), times `width`.

    Rounded once: a power of two is exact, and so is the conversion of the upper 24 of 64 bits.
    """
    # A number for a device's kernel, and yet of a type: the product is float32 by any default.
    scale = torch.tensor(width * 2.0**-64, dtype=torch.float32, device="cpu")
    return _nearly_mixed(_states(keys, shape)).bitwise_and_(_TOP_24).view(torch.uint64) * scale


def normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Float32 (n, *shape), standard normal by the inverse of the distribution function."""
    centred = uniform(keys, shape).double().add_(2.0**-25)  # never 0 or 1
    return centred.mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2)).float()


def integers(keys: Tensor, upper: int) -> Tensor:
    """Int64 (n,), uniform on 0 .. upper - 1 (bias below upper / 2**32)."""
    return (_shifted(bits(keys, (1,)), 32).squeeze(1) * upper) >> 32


def permutation(key: int, n: int) -> Tensor:
    """Return a random order of 0 .. n - 1 on the CPU: the samples sorted by their keys."""
    return sample_keys(key, torch.arange(n)).argsort(stable=True)
