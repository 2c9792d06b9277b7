"""Messages that a coordinator must refuse, each once, so that the refusals can be counted; drawn by a
`random.Random` or by hypothesis in its guise."""

import math
import typing

import msgspec
import numpy as np
from live_coordinator import INSIDER, group_of, plain
from msgspec import inspect

from asyncrl.wire import messages as m
from asyncrl.wire.codec import encode_group
from asyncrl.wire.rpc import MAX_FRAMES

KINDS = typing.get_args(m.Request)
INTEGERS = (0, 1, -1, 127, 255, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1)
FLOATS = (0.0, -1.0, 1e308, math.nan, math.inf, -math.inf)
TEXTS = ("", "rollout-0", "../../.keys", "\0", "ä" * 100, "x" * 1000)


def request_id(number):
    return number.to_bytes(8)


def stranger_message(rng, number):
    """The parts of message `number` of a peer that has the keys and no role: nothing is for it to say."""
    body = msgspec.msgpack.encode(_request(rng))
    match rng.randrange(6):
        case 0:
            parts = [rng.randbytes(rng.randrange(40)) for _ in range(rng.randrange(1, 6))]
            return parts * rng.choice((1, 4, MAX_FRAMES))
        case 1:
            head = rng.choice((b"", bytes(8), rng.randbytes(7), rng.randbytes(200)))
            return [head, body]
        case 2:
            frames = [rng.randbytes(rng.randrange(200)) for _ in range(rng.randrange(4))]
            frames *= rng.choice((1, 4, MAX_FRAMES))
            return [request_id(number), body, *frames]
        case 3:
            return [request_id(number), _damaged(rng, body)]
        case 4:
            return [request_id(number), bytes(rng.randrange(1 << 20)), body]
        case _:
            return [request_id(number), body]


def insider_message(rng, number, task, version):
    """The same of `INSIDER`, a rollout worker that has leased `task`, whose run is at `version`."""
    head = request_id(number)
    if rng.randrange(4):
        bad = rng.choice(_BAD_GROUPS)(rng, task, version)
        return [head, msgspec.msgpack.encode(plain(m.Submit)), bad]
    match rng.randrange(4):
        case 0:  # not for it to say
            kinds = [kind for kind in KINDS if kind.SENDER != "rollout"]
            return [head, msgspec.msgpack.encode(plain(rng.choice(kinds)))]
        case 1:
            return [head, msgspec.msgpack.encode(plain(m.Hello, worker="rollout-0"))]
        case 2:
            return [head, msgspec.msgpack.encode(plain(m.Hello, worker=INSIDER)), b"a frame"]
        case _:  # no message, whatever its beginning
            body = msgspec.msgpack.encode(plain(rng.choice(KINDS)))
            return [head, body[: rng.randrange(len(body))]]


def _request(rng):
    kind = rng.choice(KINDS)
    values = {f.name: _value(rng, inspect.type_info(f.type)) for f in msgspec.structs.fields(kind)}
    return {"type": kind.__struct_config__.tag, **values}


def _value(rng, type_):
    """A value of a type, or now and then of another."""
    if rng.randrange(8) == 0:
        return _anything(rng, 3)
    match type_:
        case inspect.UnionType(types=types):
            return _value(rng, rng.choice(types))
        case inspect.DataclassType(fields=fields) | inspect.StructType(fields=fields):
            return {field.name: _value(rng, field.type) for field in fields}
        case inspect.IntType():
            return rng.choice(INTEGERS)
        case inspect.FloatType():
            return rng.choice(FLOATS)
        case inspect.StrType():
            return rng.choice(TEXTS)
        case inspect.BytesType():
            return rng.randbytes(rng.randrange(50))
        case inspect.ListType(item_type=item):
            return [_value(rng, item) for _ in range(rng.randrange(4))]
        case inspect.DictType(value_type=value):
            return {rng.choice(TEXTS): _value(rng, value) for _ in range(rng.randrange(4))}
        case _:
            return _anything(rng, 3)


def _anything(rng, depth):
    match rng.randrange(7 if depth else 5):
        case 0:
            return rng.choice(INTEGERS)
        case 1:
            return rng.choice(FLOATS)
        case 2:
            return rng.choice(TEXTS)
        case 3:
            return rng.randbytes(rng.randrange(50))
        case 4:
            return rng.choice((None, True, False))
        case 5:
            return [_anything(rng, depth - 1) for _ in range(rng.randrange(4))]
        case _:
            return {rng.choice(TEXTS): _anything(rng, depth - 1) for _ in range(rng.randrange(4))}


def _damaged(rng, body):
    at = rng.randrange(len(body))
    match rng.randrange(5):
        case 0:
            return body[:at]
        case 1:
            return body + rng.randbytes(rng.randrange(1, 9))
        case 2:
            return body[:at] + bytes([body[at] ^ (1 << rng.randrange(8))]) + body[at + 1 :]
        case 3:
            return body[:at] + rng.randbytes(rng.randrange(9)) + body[at:]
        case _:
            return body[:at] + rng.choice((b"\x91", b"\x81\xa1a", b"\xdd\xff\xff\xff\xff")) * rng.randrange(
                9999
            )


# ---- groups on which nobody could train ------------------------------------------------------------------


def _parts(task, version):
    """Header and arrays of a good one."""
    return msgspec.msgpack.decode(encode_group(group_of(task, version), task.lease_id))


def _bad_arrays(change):
    """A group whose three arrays are `change(rng, arrays)`."""

    def make(rng, task, version):
        header, *arrays = _parts(task, version)
        return msgspec.msgpack.encode([header, *change(rng, arrays)])

    return make


def _one(change):
    """Change one of the arrays."""

    def change_one(rng, arrays):
        i = rng.randrange(len(arrays))
        return [*arrays[:i], change(rng, arrays[i]), *arrays[i + 1 :]]

    return change_one


def _bad_array(i, dtype, values):
    """Put one of `values` into one place of an array."""

    def change(rng, arrays):
        array = np.frombuffer(arrays[i], dtype).copy()
        array[rng.randrange(len(array))] = rng.choice(values)
        return [*arrays[:i], array.tobytes(), *arrays[i + 1 :]]

    return _bad_arrays(change)


def _bad_header(change):
    """A group whose header, as plain values, was changed in place by `change(rng, header, version)`."""

    def make(rng, task, version):
        encoded, *arrays = _parts(task, version)
        header = msgspec.msgpack.decode(encoded)
        change(rng, header, version)
        return msgspec.msgpack.encode([msgspec.msgpack.encode(header), *arrays])

    return make


def _in_trajectory(**choices):
    """Set a field of one of the trajectories to one of its values."""

    def change(rng, header, version):
        for name, values in choices.items():
            rng.choice(header["trajectories"])[name] = rng.choice(values)

    return _bad_header(change)


def _bad_versions(rng, header, version):
    span = rng.choice(header["trajectories"])["versions"][0]
    start, length = span["start"], span["length"]
    what, value = rng.choice(
        [
            *(("version", v) for v in (-1, version + 1, 2**63 - 1, "0", None)),
            *(("start", v) for v in (-1, start + 1, 2**63 - 1, 0.5)),
            *(("length", v) for v in (0, -1, length + 1, 2**63 - 1)),
        ]
    )
    span[what] = value


def _bad_identity(rng, header, version):
    header[rng.choice(("group_id", "lease_id", "row"))] = rng.choice(
        (-1, 2**53 + 1, 2**64 - 1, "0", None, 0.5)
    )


def _other_trajectories(rng, header, version):
    header["trajectories"] = header["trajectories"][:1] * rng.choice((0, 1, 3, 100))


def _cut(rng, task, version):
    group = encode_group(group_of(task, version), task.lease_id)
    return group[: rng.randrange(100)]


def _cut_header(rng, task, version):
    header, *arrays = _parts(task, version)
    return msgspec.msgpack.encode([header[: rng.randrange(len(header))], *arrays])


_BAD_GROUPS = [
    _cut,
    _cut_header,
    _bad_header(_bad_identity),
    _bad_header(_bad_versions),
    _bad_header(_other_trajectories),
    _in_trajectory(n_tokens=(0, 1, 7, -1, 2**53, 2**60, "6", None)),
    _in_trajectory(reward=(math.nan, math.inf, -math.inf, "1", None)),
    _in_trajectory(reward_parts=({"part": math.nan}, {"part": None}, [], "none")),
    _in_trajectory(finish_reason=("", "stopped", 0, None)),
    _in_trajectory(versions=([], None, [[0, 1, 0]])),
    _bad_arrays(lambda rng, arrays: arrays[: rng.randrange(len(arrays))]),
    _bad_arrays(lambda rng, arrays: [*arrays, rng.randbytes(8)]),
    _bad_arrays(lambda rng, arrays: [arrays[1], arrays[0], arrays[2]]),
    _bad_arrays(_one(lambda rng, array: array[: rng.randrange(len(array))])),
    _bad_arrays(_one(lambda rng, array: array + rng.randbytes(rng.randrange(1, 100)))),
    _bad_arrays(_one(lambda rng, array: array * 2)),  # as if of float64
    _bad_array(0, np.int32, (-1, -(2**31))),
    _bad_array(1, np.uint8, (2, 255)),
    _bad_array(2, np.float32, (math.nan, math.inf, -math.inf)),
]
