"""C++ out of the declaration of the ops (lets_kernels/ops/declared.py): two headers, written where the build is.

``declared.h`` has no torch in it. It has the names of the ops, and for each op two structs: ``chunk_of::<op>``, what a
CPU kernel gets of one chunk, and ``launch_of::<op>``, what a CUDA kernel is launched with. ``calls.h`` has ``call_of::
<op>``, the arguments of a call, checked and turned into addresses by csrc/call.h; the functions that torch calls; and
the registration.
"""

import importlib.util
import sys
from pathlib import Path

DECLARATION = Path(__file__).resolve().parent.parent / "lets_kernels" / "ops" / "declared.py"
DECLARED = """// Made by csrc/generate.py from lets_kernels/ops/declared.py. What it names is in layout.h and random.h.
#pragma once

namespace lets {{

namespace cuda {{
struct Run;
// What a kernel gets of each run beside its addresses: how T scales it, or the op's own numbers, or nothing.
struct Scaled {{
  int64_t filter_length, filter_count;  // as in the run table
  const void* norms;                    // the run's filter norms, or null
  double xi;
}};
struct Nothing {{}};
}}  // namespace cuda

// filter_length of a run that has no filters.
constexpr int64_t kFisher = {FISHER}, kUnscaled = {UNSCALED}, kElementWise = {ELEMENT_WISE};

// X(op, what its kernel returns of one chunk) for the ops on runs.
#define LETS_OPS(X) {ops}

namespace chunk_of {{
{chunks}
}}  // namespace chunk_of

namespace launch_of {{
{launches}
}}  // namespace launch_of

}}  // namespace lets
"""
CALLS = """// Made by csrc/generate.py from lets_kernels/ops/declared.py; included by csrc/call.h.
#pragma once

namespace lets {{

namespace call_of {{
{calls}
}}  // namespace call_of

// What torch calls. `On` is a device: it finds itself from the tensors, and runs a call.
namespace boxed {{
{boxed}
}}  // namespace boxed

template <class Library>
void define(Library& m) {{
{definitions}
}}

template <class On, class Library>
void implement(Library& m) {{
{implementations}
}}

}}  // namespace lets
"""
# The kinds that come as a list of tensors; those that are lists of the size of a parameter.
LISTS, RUNS = ("Tensors", "MaybeTensors", "Steps", "Numbers"), ("Tensors", "MaybeTensors", "Flat")
# Names in the generated code that an argument would hide. A table and a stream are called as their kind.
TAKEN = {"addresses", "at", "c", "check", "count", "draw", "draws", "dtype", "each", "i", "launched", "lists"}
TAKEN |= {"nontemporal", "numel", "on", "position", "queue", "runs", "s", "scaling", "size_t", "stream", "sums"}
TAKEN |= {"table", "to", "where"}
PLAIN = {"float": "double", "int": "int64_t", "bool": "bool", "Stream": "int64_t"}
#: The kinds whose argument is no tensor, or one that says nothing of the device.
NO_PLACE = (*PLAIN, *LISTS, "PerRun", "Table")


def declaration():
    """lets_kernels/ops/declared.py, found by its path: where the kernels are built, the package cannot be imported."""
    spec = importlib.util.spec_from_file_location("lets_kernels_declared", DECLARATION)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _parameter(a):
    """An argument as torch passes it."""
    if a.kind in PLAIN:
        return f"{PLAIN[a.kind]} {a.name}"
    if a.kind == "PerRun":
        return f"const std::vector<double>& {a.name}"
    if a.kind in LISTS:
        return f"const Tensors& {a.name}"
    return f"const std::optional<Tensor>& {a.name}" if a.optional else f"const Tensor& {a.name}"


def _member(op, a):
    """An argument as it is kept in a call: its declaration, and how it is checked; nothing for the table."""
    name, kind = a.name, a.kind
    has = {other.name for other in op.arguments}
    if kind in RUNS:
        given = f"Tensors{{{name}}}" if kind == "Flat" else name
        need = ", Need::optional" if kind == "MaybeTensors" else ""
        return f"const Runs {name}", f'{name}({given}, Call::table, dtype, where, "{name}"{need})'
    if kind == "FilterNorms" and a.written:
        return "const Scalings scaling", f'scaling(Call::table, {name}, dtype, where, "{name}")'
    if kind == "FilterNorms":  # without xi filters alone count
        of = f"params, {name}, dtype, this->xi" if {"params", "xi"} <= has else f"{name}, dtype"
        return "const Scalings scaling", f"scaling(Call::table, {of}, where)"
    if kind in PLAIN:
        return f"const {PLAIN[kind]} {name}", f"{name}({name})"
    if kind in ("PerRun", "Radii"):
        return f"const {kind} {name}", f'{name}({name}, Call::table, {"where, " * (kind == "Radii")}"{name}")'
    type, check = {
        "Mask": (
            "uint8_t* const",
            "{0} ? mask_of(*{0}, Call::table, where) : nullptr" if a.optional else "mask_of({0}, Call::table, where)",
        ),
        "Number": ("const double* const", 'element<double>({0}, where, "{0}")'),
        "Count": ("int64_t* const", 'element<int64_t>({0}, where, "{0}")'),
        "Coefficients": ("const double* const", 'element<double, 2>({0}, where, "{0}")'),
        "Random": ("const int64_t* const", 'element<int64_t, 2>({0}, where, "{0}")'),
        "Steps": ("const std::vector<float*>", "step_counts({0}, Call::table, where)"),
        "Numbers": ("const std::vector<double*>", 'element_of_each<double>({0}, where, "{0}")'),
    }[kind]
    return f"{type} {name}", f"{name}({check.format(name)})"


def _chunk(a):
    """An argument as a CPU kernel gets it: the fields of the struct, and how they are filled for a chunk `c`."""
    name, constant = a.name, "" if a.written else "const "
    if a.kind in RUNS:
        return [(f"{constant}void* {name}", f"{name}.at(c)")]
    if a.kind in PLAIN:
        return [(f"{PLAIN[a.kind]} {name}", name)] if a.kind != "Stream" else []
    return {
        "FilterNorms": [("Scaling scaling", "scaling.at(c)")],
        "Mask": [(f"{constant}uint8_t* {name}", f"{name} ? {name} + position_of(c) : nullptr")],
        "Number": [(f"double {name}", f"*{name}")],
        "Radii": [(f"double {name}", f"*{name}.at(c.run)")],
        "PerRun": [(f"double {name}", f"{name}.at(c.run)")],
        "Count": [(f"int64_t {name}", f"*{name}")],
        "Coefficients": [(f"const double* {name}", name)],
        "Random": [
            ("Draw draw", f"{{uint64_t({name}[0]), uint64_t({name}[1]), uint32_t(stream)}}"),
            ("int64_t position", "position_of(c)"),  # of the first element among the random numbers
        ],
        "Steps": [(f"const float* {name}", f"{name}[size_t(c.run)]")],
    }.get(a.kind, [])


def _launch(a):
    """An argument as a CUDA kernel gets it beside its runs: addresses on the device, and plain numbers."""
    name, constant = a.name, "" if a.written else "const "
    if a.kind in PLAIN:
        return [("uint32_t draws", f"uint32_t({name})")] if a.kind == "Stream" else [(f"{PLAIN[a.kind]} {name}", name)]
    types = {"Number": "double", "Count": "int64_t", "Coefficients": "double", "Random": "int64_t"}
    return [(f"{constant}{types[a.kind]}* {name}", name)] if a.kind in types else []


def _address(a):
    """The place of an argument in run `i`, as an address of a cuda::Run; None if those do not have it."""
    if a.kind in RUNS:
        return f"{a.name}.run(i)"
    return {
        "Radii": f"reinterpret_cast<char*>(const_cast<double*>({a.name}.at(i)))",
        "Mask": f"reinterpret_cast<char*>({a.name} ? {a.name} + Call::table[i].start : nullptr)",
        "Steps": f"reinterpret_cast<char*>({a.name}[size_t(i)])",
    }.get(a.kind)


def _each(op):
    """What a CUDA kernel gets of each run beside its addresses: the type, its declaration, and how run `i` fills it."""
    numbers = [a.name for a in op.arguments if a.kind == "PerRun"]
    if any(a.kind == "FilterNorms" for a in op.arguments):
        assert numbers in ([], ["xi"]), "a kernel has no place for other numbers of a run whose T it knows"
        return "using Each = cuda::Scaled", "{s.filter_length, s.filter_count, s.norms, s.xi}"
    if numbers:
        return f"struct Each {{ double {', '.join(numbers)}; }}", f"{{{', '.join(f'{n}.at(i)' for n in numbers)}}}"
    return "using Each = cuda::Nothing", "{}"


def _struct(op, fields, begin=""):
    body = "".join(f"  {field};\n" for field, _ in fields)
    return f"// {op.doc}\nstruct {op.name} {{\n{begin}{body}}};"


def _filled(fields):
    return "{" + ", ".join(value for _, value in fields) + "}"


def _fields(op):
    """Those of a chunk, and those of a launch."""
    chunk = [("Dtype dtype", "dtype"), ("int64_t numel", "c.numel"), ("bool nontemporal", "nontemporal")]
    launch = [("Dtype dtype", "dtype"), ("const cuda::Run* runs", "runs"), ("const Each* each", "each")]
    launch += [("int64_t count", "Call::table.size()"), ("void* stream", "queue"), ("double* sums", "sums")]
    return (
        chunk + [field for a in op.arguments for field in _chunk(a)],
        launch + [field for a in op.arguments for field in _launch(a)],
    )


def _call(op):
    parameters = ", ".join(["Where where", *map(_parameter, op.arguments)])
    # Numbers of a run first: a scaling refers to them.
    ordered = sorted(op.arguments, key=lambda a: a.kind != "PerRun")
    members = [_member(op, a) for a in ordered if a.kind != "Table"]
    kept = "".join(f"  {member};\n" for member, _ in members)
    checked = ", ".join(check for _, check in members)
    begin = f"// {op.doc}\nstruct {op.name}"
    if not _on_runs(op):
        return f"{begin} {{\n{kept}  explicit {op.name}({parameters})\n      : {checked} {{}}\n}};"
    first = next(a.name for a in op.arguments if a.kind in RUNS[:2])
    chunk, launch = _fields(op)
    addresses = [address for address in map(_address, op.arguments) if address]
    filled = _each(op)[1]
    scaling = "const Scaling s = scaling.at({i, 0, 0}); " if filled.startswith("{s.") else ""
    return (
        f"{begin} : Call {{\n"
        f"  using Result = {RESULTS[op.result]};\n"
        f"  static constexpr int lists = {len(addresses)};\n{kept}"
        f"  {op.name}({parameters})\n"
        f'      : Call(where, table, {first}, "{first}"), {checked} {{ check(*this); }}\n'
        f"  chunk_of::{op.name} at(const Chunk& c, bool nontemporal) const {{ return {_filled(chunk)}; }}\n"
        f"  using Each = launch_of::{op.name}::Each;\n"
        f"  launch_of::{op.name} launched(const cuda::Run* runs, const Each* each, void* queue, double* sums) const "
        f"{{ return {_filled(launch)}; }}\n"
        f"  Each each([[maybe_unused]] int64_t i) const {{ {scaling}return {filled}; }}\n"
        f"  void addresses(int64_t i, char** to) const {{ "
        f"{' '.join(f'to[{n}] = {address};' for n, address in enumerate(addresses))} }}\n}};"
    )


def _boxed(op):
    tensors = [a.name for a in op.arguments if a.kind not in NO_PLACE and not a.optional]
    lists = [a.name for a in op.arguments if a.kind in LISTS]
    others = f"Tensors{{{tensors[0]}}}" if tensors else lists[-1]
    names = ", ".join(["on.where", *(a.name for a in op.arguments)])
    return (
        f"template <class On>\n{'void' if op.shape is None else 'Tensor'} {op.name}"
        f"({', '.join(map(_parameter, op.arguments))}) {{\n"
        f"  const On on({lists[0]}, {others});\n  return on.run(call_of::{op.name}({names}));\n}}"
    )


RESULTS = {"None": "void", "Number": "double", "Three": "Three"}


def _on_runs(op):
    return any(a.kind == "Table" for a in op.arguments)


def check_names(ops):
    """``ValueError`` for an argument whose name the generated code has for something of its own."""
    for op in ops:
        for a in op.arguments:
            if a.name in TAKEN and a.kind.lower() != a.name:
                raise ValueError(f"{op.name}: an argument cannot be called {a.name}, as the code around it is")


def headers():
    """The text of every header, by its name."""
    declared = declaration()
    check_names(declared.OPS)
    runs = [op for op in declared.OPS if _on_runs(op)]
    return {
        "declared.h": DECLARED.format(
            **{name: getattr(declared, name) for name in ("FISHER", "UNSCALED", "ELEMENT_WISE")},
            ops=" \\\n  ".join(f"X({op.name}, {RESULTS[op.result]})" for op in runs),
            chunks="\n".join(_struct(op, _fields(op)[0]) for op in runs),
            launches="\n".join(_struct(op, _fields(op)[1], f"  {_each(op)[0]};\n") for op in runs),
        ),
        "calls.h": CALLS.format(
            calls="\n".join(map(_call, declared.OPS)),
            boxed="\n".join(map(_boxed, declared.OPS)),
            definitions="\n".join(f'  m.def("{op.schema}");' for op in declared.OPS),
            implementations="\n".join(
                f'  m.impl("{op.name}", TORCH_BOX(&boxed::{op.name}<On>));' for op in declared.OPS
            ),
        ),
    }


def write(folder):
    """Write the headers into a folder, except those that are there with the same text. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in headers().items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    return folder
