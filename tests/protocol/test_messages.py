"""Every field of every method: absent, nil, of another type, out of range, unknown.

The cases come from the method tables and, for values that are right, from the test vectors.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import get_args, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol import codec, rpc
from intercept_protocol import messages as m
from intercept_protocol._frames import MESSAGE_LIMIT
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.events import EventName
from intercept_protocol.messages.vmm import LIST_LIMIT
from intercept_protocol.outcomes import Answer
from wire_vectors.forms import ExchangeVector, load, map_from_json

VECTORS = load("methods.json", ExchangeVector)
TABLES = {
    "vmm": m.VMM_METHODS,
    "notifier": m.NOTIFIER_METHODS,
    "hypervisor": m.HYPERVISOR_METHODS,
    "operator": m.OPERATOR_METHODS,
}


@dataclass(frozen=True)
class Form:
    """One method of one role, with values that are right for all of its fields."""

    role: str
    method: str
    type: type[m.Call[object]]
    fields: dict[str, object]

    def decode(self, fields: object) -> m.Call[object]:
        if self.method == "hello":
            return codec.decode_hello([fields])
        return codec.decode_call(TABLES[self.role], self.method, [fields])

    def refusal(self, fields: object) -> WireError:
        with pytest.raises(WireError) as caught:
            self.decode(fields)
        return caught.value

    def __str__(self) -> str:
        return f"{self.role}-{self.method}"


LISTED = "regions", "vmas", "mappings"


def fullest(role: str, method: str) -> dict[str, object]:
    """The fields of the vector that has most of them."""
    found = [vector.fields for vector in VECTORS if (vector.role, vector.method) == (role, method)]
    return map_from_json(max(found, key=len))


FORMS = [Form(role, "hello", form, fullest(role, "hello")) for role, form in m.HELLOS.items()] + [
    Form(role, method, form, fullest(role, method))
    for role, table in TABLES.items()
    for method, form in table.items()
]
FIELDS = [(form, field) for form in FORMS for field in msgspec.structs.fields(form.type)]
# A client always sends `protocol` and the tag `role`: they have separate rules and tests.
REQUIRED = [(form, field.name) for form, field in FIELDS if field.required]
OPTIONAL = [(form, field) for form, field in FIELDS if not field.required and field.name != "protocol"]
NAMES = [(form, field.name) for form, field in FIELDS if field.name != "protocol"]
INTEGERS = [(form, name) for form, name in NAMES if type(form.fields.get(name)) is int]
BOOLEANS = [(form, name) for form, name in NAMES if type(form.fields.get(name)) is bool]
WORDS = [(form, name) for form, name in NAMES if type(form.fields.get(name)) is str and name != "name"]

LISTS = [
    (form, name)
    for form, name in NAMES
    if isinstance(values := form.fields.get(name), list) and isinstance(values[0], dict)
]

each_form = pytest.mark.parametrize("form", FORMS, ids=str)


def each(cases: list[tuple[Form, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("form", "name"), cases, ids=[f"{form}-{name}" for form, name in cases])


def assert_names(error: WireError, field: str) -> None:
    """The refusal is EINVAL, for programs in `details` and for people in the message."""
    assert (error.number, error.details["field"]) == (errno.EINVAL, field)
    assert error.details.keys() <= {"field", "choices"}
    assert field in error.message


# ---------------------------------------------------------------- restarts


def test_every_request_says_what_a_restarted_daemon_does_with_it() -> None:
    assert [str(form) for form in FORMS if not hasattr(form.type, "RESTART")] == []


def test_what_changes_a_partition_is_logged_and_all_else_is_repeatable() -> None:
    logged = {form.method for form in FORMS if form.type.RESTART == "logged"}
    operator = {form.type.RESTART for form in FORMS if form.role == "operator"}

    assert logged == {
        *("create_partition", "attach_memory", "add_region", "remove_region", "change_regions"),
        *("map_vma", "map_vmas", "unmap_vma", "protect_vma", "restore"),
        *("invalidate_begin", "invalidate_end"),
    }
    assert operator == {"repeatable"}


BEFORE_RESTARTS = {
    "create_partition": "address_space hypervisor architecture mmio_granularity remap deposit_pages"
    " invalidate_timeout_ms",
    "add_region": "start_gfn page_count start_uaddr kind writable executable",
    "remove_region": "start_gfn page_count start_uaddr",
    "change_regions": "remove add",
    "map_vma": "start_uaddr page_count start_pfn readable writable executable io",
    "map_vmas": "vmas",
    "unmap_vma": "start_uaddr page_count",
    "protect_vma": "start_uaddr page_count readable writable executable",
    "attach_memory": "promise_begin_end",
    "kick": "vp_index",
    "set_policy": "mmio_granularity",
    "statistics": "",
    "translate": "gfn",
    "prefault": "start_gfn page_count",
    "list_regions": "after",
    "list_vmas": "after",
    "list_mappings": "after",
    "invalidate_begin": "start_uaddr length",
    "invalidate_end": "start_uaddr length",
    "invalidate": "start_uaddr length",
}
"""The fields of each request of a VMM of the version before restarts."""
HELLOS_BEFORE_RESTARTS: dict[type[msgspec.Struct], str] = {
    m.HelloVmm: "protocol role name",
    m.HelloVp: "protocol role partition_id vp_index token",
    m.HelloNotifier: "protocol role partition_id token",
    m.HelloHypervisor: "protocol role partition_id token lists",
}


def fields_of(call: type[msgspec.Struct]) -> tuple[set[str], set[str]]:
    """Those that a request must have, and all."""
    fields = msgspec.structs.fields(call)
    return {field.encode_name for field in fields if field.required}, {field.encode_name for field in fields}


def test_a_vmm_that_knows_nothing_of_restarts_asks_what_is_served() -> None:
    """So it survives them unchanged, and so do the tests' VMMs, which ask nothing else."""
    calls: list[tuple[type[msgspec.Struct], str]] = [*HELLOS_BEFORE_RESTARTS.items()]
    for methods in (m.VMM_METHODS, m.NOTIFIER_METHODS):
        calls += [(call, BEFORE_RESTARTS[name]) for name, call in methods.items() if name in BEFORE_RESTARTS]
    assert len(calls) > len(BEFORE_RESTARTS)
    for call, names in calls:
        required, known = fields_of(call)
        assert required <= set(names.split()) <= known | {"role"}, call


# ---------------------------------------------------------------- every field


def test_every_field_of_every_method_has_a_value_in_the_vectors() -> None:
    assert {(form, name) for form, name in NAMES if name not in form.fields} == set()


@each_form
def test_all_fields_right_are_decoded(form: Form) -> None:
    assert codec.to_fields(form.decode(form.fields)) == form.fields


@each_form
def test_call_survives_to_fields_and_the_wire(form: Form) -> None:
    call = form.decode(form.fields)
    receiver = rpc.Receiver({rpc.REQUEST})
    receiver.receive_data(rpc.encode_request(1, form.method, [codec.to_fields(call)]))

    request = receiver.next_message()

    assert isinstance(request, rpc.Request)
    assert form.decode(*request.params) == call


@each(REQUIRED)
def test_required_field_missing_is_named(form: Form, name: str) -> None:
    fields = {key: value for key, value in form.fields.items() if key != name}

    assert_names(form.refusal(fields), name)


@each(REQUIRED)
def test_required_field_nil_is_named(form: Form, name: str) -> None:
    assert_names(form.refusal(form.fields | {name: None}), name)


def default_of(field: msgspec.structs.FieldInfo) -> object:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


@pytest.mark.parametrize(
    ("form", "field"), OPTIONAL, ids=[f"{form}-{field.name}" for form, field in OPTIONAL]
)
def test_optional_field_absent_or_nil_is_its_default(form: Form, field: msgspec.structs.FieldInfo) -> None:
    absent = {key: value for key, value in form.fields.items() if key != field.name}

    assert getattr(form.decode(absent), field.name) == default_of(field)
    assert form.decode(form.fields | {field.name: None}) == form.decode(absent)


def test_defaults_are_those_of_the_wire_specification() -> None:
    defaults = {f"{form}.{field.name}": default_of(field) for form, field in OPTIONAL}

    assert defaults == {
        "vmm-hello.name": "",
        "vmm-create_partition.architecture": "x86_64",
        "vmm-create_partition.mmio_granularity": "vma",
        "vmm-create_partition.remap": "replace",
        "vmm-create_partition.deposit_pages": None,
        "vmm-create_partition.invalidate_timeout_ms": None,
        "vmm-change_regions.remove": [],
        "vmm-change_regions.add": [],
        "vmm-attach_memory.promise_begin_end": None,
        "vmm-attach_memory.userfaultfd_errno": None,
        "vmm-set_policy.mmio_granularity": None,
        "vmm-restore.around_pages": 64,
        "vmm-restore.on_image_error": "hold",
        "vmm-restore.connect_timeout_ms": 60_000,
        "vmm-restore.prefetch": False,
        "vmm-restore.trace": False,
        "hypervisor-hello.lists": False,
        **{f"{role}-list_{what}.after": None for role in ("vmm", "operator") for what in LISTED},
        "hypervisor-map_gpa.start_pfn": None,
        "operator-histograms.after": None,
        "operator-list_partitions.after": 0,
        "operator-set_policy.mmio_granularity": None,
        "operator-subscribe.partition_id": None,
        "operator-subscribe.vp_index": None,
        "operator-subscribe.reasons": None,
    }


@each_form
def test_unknown_field_is_named(form: Form) -> None:
    assert_names(form.refusal(form.fields | {"no_such_field": 1}), "no_such_field")


@each_form
def test_unknown_field_is_named_even_if_nil(form: Form) -> None:
    assert_names(form.refusal(form.fields | {"no_such_field": None}), "no_such_field")


@each_form
@pytest.mark.parametrize("key", [5, None, b"bytes", True])
def test_non_string_key_is_refused(form: Form, key: object) -> None:
    error = form.refusal(form.fields | {key: 1})

    assert error.details == {"field": "params"}


@each([case for case in NAMES if case not in LISTS])
@pytest.mark.parametrize("wrong", [[[]], [1], {}, {"a": 1}, 1.5], ids=repr)
def test_field_of_a_type_that_no_field_has_is_named(form: Form, name: str, wrong: object) -> None:
    assert_names(form.refusal(form.fields | {name: wrong}), name)


@each(INTEGERS)
@pytest.mark.parametrize("wrong", [-1, -(2**63), True, 1.0, "1", b"1"], ids=repr)
def test_integer_field_with_no_unsigned_integer_is_named(form: Form, name: str, wrong: object) -> None:
    assert_names(form.refusal(form.fields | {name: wrong}), name)


@each(BOOLEANS)
@pytest.mark.parametrize("wrong", [0, 1, "true"], ids=repr)
def test_boolean_field_with_no_boolean_is_named(form: Form, name: str, wrong: object) -> None:
    assert_names(form.refusal(form.fields | {name: wrong}), name)


@each(WORDS)
@pytest.mark.parametrize("wrong", ["no_such_word", "", b"vma"], ids=repr)
def test_word_field_with_another_word_is_named_with_the_choices(form: Form, name: str, wrong: object) -> None:
    refusal = form.refusal(form.fields | {name: wrong})

    assert_names(refusal, name)
    choices = msgspec.convert(refusal.details["choices"], list[str])
    assert form.fields[name] in choices
    assert ", ".join(choices) in refusal.message


@pytest.mark.parametrize(
    ("field", "wrong", "right"),
    [
        ("address_space", "image", ["declared", "process"]),
        ("address_space", b"image", ["declared", "process"]),
        ("hypervisor", "userfaultfd", ["software", "vmm"]),
        ("hypervisor", 5, ["software", "vmm"]),
    ],
)
@pytest.mark.parametrize("others", [{}, {"no_such_field": 1}], ids=["", "with another fault"])
def test_words_of_a_restored_guest_create_no_partition(
    field: str, wrong: object, right: list[str], others: dict[str, object]
) -> None:
    fields = {"address_space": "declared", "hypervisor": "software", field: wrong, **others}
    with pytest.raises(WireError, match=f"create_partition: {field}: must be one of") as caught:
        codec.decode_call(m.VMM_METHODS, "create_partition", [fields])

    assert caught.value.details == {"field": field, "choices": right}


RESTORE_BOUNDS = {"around_pages": (1, 512), "connect_timeout_ms": (1, 3_600_000)}


@pytest.mark.parametrize("name", RESTORE_BOUNDS)
def test_numbers_of_a_restore_have_the_bounds_that_the_specification_states(name: str) -> None:
    least, most = RESTORE_BOUNDS[name]
    for right in (least, most):
        codec.decode_call(m.VMM_METHODS, "restore", [{name: right}])
    for wrong in (least - 1, most + 1):
        with pytest.raises(WireError) as caught:
            codec.decode_call(m.VMM_METHODS, "restore", [{name: wrong}])
        assert_names(caught.value, name)


def test_word_that_a_number_could_stand_for_is_refused_with_both_choices() -> None:
    with pytest.raises(WireError, match="must be a number or all;") as caught:
        codec.decode_call(m.VMM_METHODS, "kick", [{"vp_index": "some"}])

    assert caught.value.details == {"field": "vp_index", "choices": ["all"]}


def test_word_of_a_list_is_refused_with_the_choices() -> None:
    with pytest.raises(WireError) as caught:
        codec.decode_call(m.OPERATOR_METHODS, "subscribe", [{"events": ["drain_started", "rain_started"]}])

    assert caught.value.details == {"field": "events", "choices": [name.value for name in EventName]}
    assert "'rain_started'" in caught.value.message


def elements(form: Form, name: str) -> list[dict[str, object]]:
    return msgspec.convert(form.fields[name], list[dict[str, object]])


@each(LISTS)
@pytest.mark.parametrize("wrong", [{}, {"a": 1}, 1.5, 1, ""], ids=repr)
def test_list_field_with_no_list_is_named(form: Form, name: str, wrong: object) -> None:
    assert_names(form.refusal(form.fields | {name: wrong}), name)


@each(LISTS)
def test_list_field_with_too_many_elements_is_named(form: Form, name: str) -> None:
    assert_names(form.refusal(form.fields | {name: elements(form, name)[:1] * (LIST_LIMIT + 1)}), name)


@each(LISTS)
@pytest.mark.parametrize("wrong", [1, None, [], "x"], ids=repr)
def test_element_that_is_no_map_is_named(form: Form, name: str, wrong: object) -> None:
    right = elements(form, name)
    error = form.refusal(form.fields | {name: [*right, wrong]})

    assert error.details == {"list": name, "index": len(right), "field": "params"}


@each(LISTS)
def test_each_required_field_of_an_element_is_named_with_its_place(form: Form, name: str) -> None:
    """As a request with that element alone names it."""
    right = elements(form, name)
    (element,) = get_args(get_type_hints(form.type)[name])
    for field in (field.name for field in msgspec.structs.fields(element) if field.required):
        wrong = {key: value for key, value in right[0].items() if key != field}
        error = form.refusal(form.fields | {name: [*right, wrong, {}]})

        assert (error.number, error.details) == (
            errno.EINVAL,
            {"list": name, "index": len(right), "field": field},
        )
        assert error.message == f"{form.method}: {name}[{len(right)}]: {field}: is missing"


@each(LISTS)
def test_unknown_field_of_an_element_is_named_with_its_place(form: Form, name: str) -> None:
    error = form.refusal(form.fields | {name: [elements(form, name)[0] | {"a` - at `$.b[1]": 1}]})

    assert error.details == {"list": name, "index": 0, "field": "a` - at `$.b[1]"}


@each([(form, name) for form, name in INTEGERS if name.startswith("start_") or name in ("gfn", "length")])
def test_address_field_takes_64_bits(form: Form, name: str) -> None:
    assert getattr(form.decode(form.fields | {name: 2**64 - 1}), name) == 2**64 - 1


@each(
    [
        (form, name)
        for form, name in INTEGERS
        if (name.endswith("_ms") or name in ("vp_index", "deposit_pages")) and form.method != "restore"
    ]
)
def test_32_bit_field_refuses_33_bits(form: Form, name: str) -> None:
    assert_names(form.refusal(form.fields | {name: 2**32}), name)
    assert getattr(form.decode(form.fields | {name: 2**32 - 1}), name) == 2**32 - 1


# ---------------------------------------------------------------- params and methods


@pytest.mark.parametrize("params", [[1], [None], [b"x"], [[]], [{}, {}], [{}, 1]], ids=repr)
def test_params_other_than_one_map_are_refused(params: list[object]) -> None:
    with pytest.raises(WireError) as caught:
        codec.decode_call(m.VMM_METHODS, "statistics", params)

    assert_names(caught.value, "params")


@pytest.mark.parametrize("params", [[], [{}]], ids=repr)
def test_params_may_be_left_out_where_no_field_is_required(params: list[object]) -> None:
    assert codec.decode_call(m.VMM_METHODS, "statistics", params) == m.Statistics()


@pytest.mark.parametrize("role", TABLES)
@pytest.mark.parametrize("method", ["no_such_method", "", "hello", "intercept"])
def test_unknown_and_reserved_methods_are_enosys(role: str, method: str) -> None:
    with pytest.raises(WireError) as caught:
        codec.decode_call(TABLES[role], method, [])

    assert caught.value.number == errno.ENOSYS
    assert caught.value.details == {"methods": sorted(TABLES[role])}


def test_method_of_another_role_is_enosys() -> None:
    with pytest.raises(WireError) as caught:
        codec.decode_call(m.NOTIFIER_METHODS, "add_region", [])

    assert caught.value.number == errno.ENOSYS


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("m" * 60_000, []),
        ("kick", [{"k" * 60_000: 1}]),
        ("kick", [{"vp_index": "v" * 60_000}]),
        ("create_partition", [{"address_space": "a" * 60_000, "hypervisor": "vmm"}]),
    ],
    ids=["method", "field", "value", "word"],
)
def test_refusal_of_a_huge_request_is_small(method: str, params: list[object]) -> None:
    with pytest.raises(WireError) as caught:
        codec.decode_call(m.VMM_METHODS, method, params)

    assert len(rpc.encode_error(1, caught.value)) < 1024


@pytest.mark.parametrize("key", ["a - at `$.b`", "a[1]", "`", "", "key`"])
def test_unknown_field_with_an_odd_name_is_named_whole(key: str) -> None:
    with pytest.raises(WireError) as caught:
        codec.decode_call(m.VMM_METHODS, "statistics", [{key: 1}])

    assert caught.value.details == {"field": key}


def test_value_that_looks_like_a_path_does_not_change_the_field_named() -> None:
    with pytest.raises(WireError) as caught:
        codec.decode_call(m.VMM_METHODS, "kick", [{"vp_index": "x - at `$.other`"}])

    assert caught.value.details["field"] == "vp_index"


names = st.text(max_size=6) | st.sampled_from(["vp_index", "gfn", "start_gfn"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(names, inner),
    max_leaves=8,
)


@given(st.sampled_from(FORMS), st.lists(anything | st.dictionaries(names, anything), max_size=2))
def test_any_params_are_a_call_or_a_wire_error(form: Form, params: list[object]) -> None:
    try:
        call = codec.decode_fields(form.type, form.method, params)
    except WireError as error:
        assert error.to_wire()[0] == errno.EINVAL  # noqa: PT017 - an error is one of two right answers
    else:
        assert isinstance(call, form.type)


# ---------------------------------------------------------------- hello


@pytest.mark.parametrize(
    "params", [[], [{}], [{"role": "vmm"}], [{"role": "vmm", "protocol": None}]], ids=repr
)
def test_hello_without_protocol_is_refused_first(params: list[object]) -> None:
    with pytest.raises(WireError) as caught:
        codec.decode_hello(params)

    assert_names(caught.value, "protocol")


@pytest.mark.parametrize("version", [0, 2, 2**64 - 1, -1])
def test_hello_of_another_version_gets_the_supported_version_despite_other_errors(version: int) -> None:
    with pytest.raises(WireError) as caught:
        codec.decode_hello([{"protocol": version, "a": "later idea"}])

    assert caught.value.number == errno.EPROTONOSUPPORT
    assert caught.value.details == {"supported": [1]}


@pytest.mark.parametrize("version", [True, False, 1.0, "1", b"1", [1]], ids=repr)
def test_hello_whose_protocol_is_not_an_integer_is_refused(version: object) -> None:
    with pytest.raises(WireError) as caught:
        codec.decode_hello([{"protocol": version, "role": "vmm"}])

    assert_names(caught.value, "protocol")


@pytest.mark.parametrize(
    "hello", [{}, {"role": None}, {"role": "admin"}, {"role": 5}, {"role": ["vmm"]}], ids=repr
)
def test_hello_without_a_known_role_is_refused(hello: dict[str, object]) -> None:
    with pytest.raises(WireError) as caught:
        codec.decode_hello([{"protocol": 1} | hello])

    assert_names(caught.value, "role")


@pytest.mark.parametrize("params", [[{}, {}], [1], [None]], ids=repr)
def test_hello_params_other_than_one_map_are_refused(params: list[object]) -> None:
    with pytest.raises(WireError) as caught:
        codec.decode_hello(params)

    assert_names(caught.value, "params")


@pytest.mark.parametrize("role", m.HELLOS)
def test_role_of_a_hello_is_its_word_on_the_wire(role: str) -> None:
    assert codec.role_of(codec.decode_hello([fullest(role, "hello")])) == role


@pytest.mark.parametrize("role", ["vp", "notifier", "hypervisor"])
@pytest.mark.parametrize(
    "token", [b"", bytes(15), bytes(17), "0123456789abcdef", "AAECAwQFBgcICQoLDA0ODw=="], ids=repr
)
def test_hello_token_other_than_16_bytes_is_refused(role: str, token: object) -> None:
    with pytest.raises(WireError) as caught:
        codec.decode_hello([fullest(role, "hello") | {"token": token}])

    assert_names(caught.value, "token")


def test_hello_name_may_have_64_characters_and_no_more() -> None:
    assert codec.decode_hello([{"protocol": 1, "role": "vmm", "name": "é" * 64}]) == m.HelloVmm(name="é" * 64)
    with pytest.raises(WireError) as caught:
        codec.decode_hello([{"protocol": 1, "role": "vmm", "name": "é" * 65}])

    assert_names(caught.value, "name")


# ---------------------------------------------------------------- replies


@each_form
def test_reply_of_another_form_is_eproto_and_names_the_method(form: Form) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        codec.decode_reply(form.decode(form.fields), "no such thing")

    assert caught.value.number == errno.EPROTO
    assert form.method in caught.value.message


def test_reply_with_unknown_keys_is_taken_without_them() -> None:
    reply = codec.decode_reply(
        m.Translate(gfn=1), {"frame": ["host", 5], "access": 3, "pfn": 5, "later": {"idea": 1}}
    )

    assert reply == m.Translation(frame=("host", 5), access=3, pfn=5)


def test_reply_without_an_optional_key_is_taken() -> None:
    assert codec.decode_reply(m.Translate(gfn=1), {"frame": [b"memfd", 5], "access": 1}) == m.Translation(
        frame=(b"memfd", 5), access=1
    )


def test_reply_nil_is_taken_where_it_may_be() -> None:
    assert codec.decode_reply(m.Translate(gfn=1), None) is None


def test_reply_with_a_string_for_bytes_is_eproto() -> None:
    call = m.CreatePartition(address_space=m.AddressSpaceKind.DECLARED, hypervisor=m.HypervisorKind.SOFTWARE)

    with pytest.raises(ProtocolViolation) as caught:
        codec.decode_reply(call, {"partition_id": 1, "token": "AAAA"})

    assert caught.value.number == errno.EPROTO


def test_reply_error_about_a_huge_answer_is_cut() -> None:
    with pytest.raises(ProtocolViolation) as caught:
        codec.decode_reply(
            m.AddRegion(
                start_gfn=0,
                page_count=1,
                start_uaddr=0,
                kind=m.RequestedKind.AUTO,
                writable=True,
                executable=False,
            ),
            {"kind": "k" * 60_000},
        )

    assert len(caught.value.message) < 300


def test_to_fields_omits_none() -> None:
    assert codec.to_fields(m.SetPolicy()) == {}


def test_to_fields_keeps_bytes_and_spells_enums() -> None:
    reply = m.PartitionCredentials(partition_id=1, token=bytes(16))

    assert codec.to_fields(reply) == {"partition_id": 1, "token": bytes(16)}
    assert codec.to_fields(m.AddRegionReply(kind=m.RegionKind.PINNED)) == {"kind": "pinned"}


# ---------------------------------------------------------------- sizes

U64_MAX = 2**64 - 1
LARGEST_BUCKETS = (U64_MAX,) * m.LATENCY_BUCKETS
LARGEST_SUMMARY = m.PartitionSummary(
    partition_id=U64_MAX, name="\U0001f600" * 64, uid=2**32 - 2, pid=2**31 - 1, address_space="declared",
    hypervisor="software", vps=U64_MAX, regions=U64_MAX, mapped_gfns=U64_MAX, intercepts=U64_MAX,
    invalidations=U64_MAX, age_ms=U64_MAX, latency=LARGEST_BUCKETS, latency_waited=LARGEST_BUCKETS,
    watch="userfaultfd",
)  # fmt: skip
LARGEST_RESTORED_SUMMARY = msgspec.structs.replace(
    LARGEST_SUMMARY, address_space="image", hypervisor="userfaultfd", vps=1, regions=256, restore="complete"
)
"""Of a restored guest, which has no more regions than one hand-off names."""
LARGEST_REGION = m.RegionView(
    start_gfn=U64_MAX, page_count=U64_MAX, start_uaddr=U64_MAX, kind=m.RegionKind.MOVABLE,
    state="populating", writable=True, executable=True, mapped_gfns=U64_MAX,
)  # fmt: skip
LARGEST_VP = m.VpView(vp_index=255, state="waiting", intercepts=U64_MAX)
NO_NUMBERS = "intercepts", "unresolved", "latency", "latency_waited", "state", "error", "restore"
LARGEST_RESTORE = m.RestoreStatistics(
    **{name: U64_MAX for name in m.RestoreStatistics.__struct_fields__ if name not in NO_NUMBERS},
    state="complete",
    error="x" * 4096,
    latency=LARGEST_BUCKETS,
)
LARGEST_STATISTICS = m.PartitionStatistics(
    **{name: U64_MAX for name in m.PartitionStatistics.__struct_fields__ if name not in NO_NUMBERS},
    intercepts={answer.outcome: {a.reason: U64_MAX for a in Answer} for answer in Answer},
    unresolved={f"cause_with_a_long_name_{number}": U64_MAX for number in range(32)},
    latency=LARGEST_BUCKETS,
    latency_waited=LARGEST_BUCKETS,
    restore=LARGEST_RESTORE,
)


def wire_size(reply: msgspec.Struct) -> int:
    return len(rpc.encode_result(2**32 - 1, codec.to_fields(reply)))


@pytest.mark.parametrize("largest", [LARGEST_SUMMARY, LARGEST_RESTORED_SUMMARY], ids=["other", "restored"])
def test_largest_page_of_partitions_fits_in_one_message(largest: m.PartitionSummary) -> None:
    reply = m.PartitionList(partitions=[largest] * m.PartitionList.PAGE, more=True)

    assert wire_size(reply) <= MESSAGE_LIMIT


def test_largest_page_of_histograms_fits_in_one_message() -> None:
    largest = m.VpHistogram(
        vp_index=255, intercepts=U64_MAX, total_ns=U64_MAX, buckets=LARGEST_BUCKETS,
        waited_ns=U64_MAX, waited_buckets=LARGEST_BUCKETS,
    )  # fmt: skip
    reply = m.HistogramPage(
        boundaries_ns=LARGEST_BUCKETS, virtual_processors=[largest] * m.HistogramPage.PAGE, more=True
    )

    assert wire_size(reply) <= MESSAGE_LIMIT


def test_largest_pages_of_regions_vmas_and_mappings_fit_in_one_message() -> None:
    vma = m.VmaView(
        start_uaddr=U64_MAX, page_count=U64_MAX, start_pfn=U64_MAX, readable=True, writable=True,
        executable=True, io=True,
    )  # fmt: skip
    backing = f"file {2**32 - 1}:{2**32 - 1}:{U64_MAX}"
    mapping = m.MappingView(
        start_gfn=U64_MAX, page_count=U64_MAX, start_uaddr=U64_MAX, frame=(backing, U64_MAX), access=7
    )
    replies = (
        m.RegionPage(regions=[LARGEST_REGION] * m.RegionPage.PAGE, more=True),
        m.VmaPage(vmas=[vma] * m.VmaPage.PAGE, more=True),
        m.MappingPage(mappings=[mapping] * m.MappingPage.PAGE, more=True),
    )

    assert max(map(wire_size, replies)) <= MESSAGE_LIMIT


def test_largest_inspection_fits_in_one_message() -> None:
    reply = m.PartitionInspection(
        summary=LARGEST_SUMMARY,
        architecture=m.Architecture.X86_64,
        mmio_granularity=m.MmioGranularity.PAGE,
        statistics=LARGEST_STATISTICS,
        regions=[LARGEST_REGION] * m.PartitionInspection.REGION_VIEWS,
        virtual_processors=[LARGEST_VP] * 256,
    )

    assert wire_size(reply) <= MESSAGE_LIMIT
