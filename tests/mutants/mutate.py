"""Mutants: one small error each, planted wherever a rule finds a place for it in the formulas and the kernels.

    for mutant in mutants():         all of them, in the order of the sources
        mutant.plant(folder)         a copy of csrc with that error
        mutant.operators             whose kernels could notice, by what they use

The rules are patterns on text. They rely on clang-format: spaces stand around binary operators, and around no others.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from builds import CSRC, OPERATORS, changed_sources

SHARED = ("math.h", "cuda/launch.cuh", "cuda/reduce.cuh", "cuda/rows.cuh", "cuda/elements.cuh")
FILES = (*SHARED, *(f"cuda/{operator}.cuh" for operator in OPERATORS))


@dataclass(frozen=True)
class Mutant:
    name: str  # file, function and rule; where a rule finds several places in a function, which of them
    file: str
    begin: int
    end: int
    new: str
    operators: tuple[str, ...]

    def plant(self, folder: Path) -> Path:
        text = _text(self.file)
        return changed_sources(folder, self.file, text, text[: self.begin] + self.new + text[self.end :])

    @property
    def change(self) -> str:
        """The line that it is in, before and after."""
        text = _text(self.file)
        begin, end = text.rfind("\n", 0, self.begin) + 1, text.find("\n", self.end)
        before, after = text[begin : self.begin], text[self.end : end]
        return f"{before}{text[self.begin : self.end]}{after}".strip() + "  =>  " + f"{before}{self.new}{after}".strip()


# ---- rules ---------------------------------------------------------------------------------------------------------

_IN_BRACKETS = r"\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\)"
_OPERAND = rf"(?:(?<![\w.])-?[\w.:]+(?:<[^<>()]*(?:<[^<>]*>)?>)?(?:{_IN_BRACKETS}|\[[^\[\]]*\])*|{_IN_BRACKETS})"
_PRODUCT = rf"{_OPERAND}(?: [*/] {_OPERAND})*"
_ARGUMENT = rf"\s*((?:[^(),;]|{_IN_BRACKETS})+)"

#: what is done: (what is searched for, what it becomes)
RULES = {
    "+ becomes -": (r" \+ ", " - "),
    "- becomes +": (r" - ", " + "),
    "* becomes /": (r" \* ", " / "),
    "/ becomes *": (r" / ", " * "),
    "+= becomes -=": (r" \+= ", " -= "),
    "< becomes <=": (r" < ", " <= "),
    "<= becomes <": (r" <= ", " < "),
    "> becomes >=": (r" > ", " >= "),
    ">= becomes >": (r" >= ", " > "),
    "< becomes >": (r" < ", " > "),
    "== becomes !=": (r" == ", " != "),
    "&& becomes ||": (r" && ", " || "),
    "|| becomes &&": (r" \|\| ", " && "),
    "^ becomes |": (r" \^ ", " | "),
    "max becomes min": (r"\bmax\(", "min("),
    "min becomes max": (r"\bmin\(", "max("),
    "Max becomes Add": (r"\bMax\{", "Add{"),
    "Add becomes Max": (r"\bAdd\{", "Max{"),
    "0 becomes 1": (r"\b([VA])\(0\)|(?<== )0(?=[;,])", r"\g<1>(1)"),
    "1 becomes 0": (r"\b([VA])\(1\)", r"\1(0)"),
    "-inf becomes 0": (r"-INFINITY", "0"),
    "a constant is doubled": (r"\bV\((-?(?:[2-9]|\d\.\d+f?|0x1p-\d+))\)", r"V(2 * \1)"),
    "a bit of a constant": (r"\b0x[0-9A-F]{8}u", r"(\g<0> ^ 1u)"),
    "a minus is dropped": (r"(return |[(,=] |\()-(?=[a-z(])", r"\1"),
    "a function is dropped": (r"(?<![\w:.])(?:exp|log|sqrt|abs|sign|floor)(?=\()", ""),
    "a term is dropped": (rf" [-+] {_PRODUCT}", ""),
    "a factor is dropped": (rf" [*/] {_OPERAND}", ""),
    "a difference is reversed": (rf"(?<![-+*/] )(?<![\w.)-])({_PRODUCT}) - ({_PRODUCT})", r"\2 - \1"),
    "weighted becomes a product": (rf"\bweighted\({_ARGUMENT},{_ARGUMENT}\)", r"((\1) * (\2))"),
    "always the first": (rf"\bselect\({_ARGUMENT},{_ARGUMENT},{_ARGUMENT}\)", r"(\2)"),
    "always the second": (rf"\bselect\({_ARGUMENT},{_ARGUMENT},{_ARGUMENT}\)", r"(\3)"),
    "no lower bound": (rf"\bclamp\({_ARGUMENT},{_ARGUMENT},{_ARGUMENT}\)", r"min(\1, \3)"),
    "no upper bound": (rf"\bclamp\({_ARGUMENT},{_ARGUMENT},{_ARGUMENT}\)", r"max(\1, \2)"),
    "in any case": (rf"\bif ({_IN_BRACKETS})", "if (true)"),
    "in no case": (rf"\bif ({_IN_BRACKETS})", "if (false)"),
}


def _places(pattern: str, code: str) -> Iterator[re.Match[str]]:
    """All matches, those within others too."""
    search, match = re.compile(pattern).search, None
    while match := search(code, match.start() + 1 if match else 0):
        yield match


# ---- sources -------------------------------------------------------------------------------------------------------

_DEFINITION = re.compile(
    r"^struct (?P<struct>\w+)"
    r"|^(?P<constant>constexpr) .*?\w+(?= =)"
    r"|^(?P<method>  )?(?:static )?(?:DTF_DEVICE|DTF_INLINE|inline|void|Geometry) .*?(?:operator\S\S|\w+)(?=\()"
    r"|^\w+(?=\(\w+<T> k)",  # a kernel
    re.MULTILINE,
)
_NO_CODE = re.compile(r"//.*|^#(?:.*\\\n)*.*|^ *template <.*>$|static_assert\(.*", re.MULTILINE)


@dataclass(frozen=True)
class _Scope:
    """A function, a constant, or what a struct has besides its functions."""

    name: str
    owner: str  # the struct or the function that others know it by
    begin: int
    body: str


@cache
def _text(file: str) -> str:
    return (CSRC / file).read_text()


@cache
def _scopes(file: str) -> list[_Scope]:
    code = _NO_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), _text(file))
    found, owner = [], ""
    definitions = list(_DEFINITION.finditer(code))
    for definition, after in zip(definitions, [*definitions[1:], None], strict=True):
        name = re.findall(r"operator\S\S|\w+", definition[0])[-1]
        owner = owner if definition["method"] else name
        begin = code.index("=" if definition["constant"] else "{", definition.end())
        body = code[begin : after.start() if after else None]
        found.append(_Scope(f"{owner}.{name}" if definition["method"] else name, owner, begin, body))
    return found


def _words(scopes: list[_Scope]) -> set[str]:
    return set(re.findall(r"\w+", " ".join(scope.body for scope in scopes)))


@cache
def _used_by(operator: str) -> set[str]:
    """The names that an operator's kernels use, and those that these use."""
    shared = [scope for file in SHARED for scope in _scopes(file)]
    words, before = _words(_scopes(f"cuda/{operator}.cuh")), set()
    while words != before:
        before = words
        words = words | _words([scope for scope in shared if scope.owner in before])
    return words


def _operators(file: str, scope: _Scope) -> tuple[str, ...]:
    if file not in SHARED:
        return (Path(file).stem,)
    return tuple(operator for operator in OPERATORS if scope.owner in _used_by(operator))


def mutants() -> list[Mutant]:
    places: dict[tuple[str, str], list[tuple[str, _Scope, int, int, str]]] = defaultdict(list)
    known: set[str] = set()  # two rules may come to the same text
    for file in FILES:
        for scope in _scopes(file):
            for rule, (pattern, new) in RULES.items():
                for place in _places(pattern, scope.body):
                    begin, end, becomes = scope.begin + place.start(), scope.begin + place.end(), place.expand(new)
                    text = _text(file)[:begin] + becomes + _text(file)[end:]
                    if text not in known:
                        known.add(text)
                        places[f"{Path(file).name} {scope.name}", rule].append((file, scope, begin, end, becomes))
    return [
        Mutant(
            f"{where}: {rule}" + (f" #{i}" if len(found) > 1 else ""),
            file,
            begin,
            end,
            new,
            _operators(file, scope),
        )
        for (where, rule), found in places.items()
        for i, (file, scope, begin, end, new) in enumerate(found, 1)
    ]
