"""Tasks: what a circuit is a circuit of. Pairs of prompts that differ in one fact, so that what the fact
travels through can be found.

    clean      When Mary and John went to the store, John gave a drink to       -> " Mary", not " John"
    corrupted  When Mary and John went to the store, Paul gave a drink to       -> either

The corrupted twin has the same number of tokens, and what is not the fact stays where it was: replace an
activation of the clean run by its twin's, and only the fact is lost. How well the model still knows it is the
metric, at the position(s) of the answer:

    logit difference        mean logit of the right tokens - mean logit of the wrong ones
    probability difference  sum of the probabilities of the right tokens - sum of those of the wrong ones
                            (Greater Than)

    python analyze.py tasks ioi --n=5                          prints five pairs
    python analyze.py tasks                                    prints what there is

Sources: IOI, Wang et al. 2022; Greater Than, Hanna et al. 2023; Docstring, Heimersheim & Janiak 2023; paper's
section on circuits (arXiv 2512.05865), IOI Long included. Notable: every name, noun and year is checked
against the tokenizer and left out if it does not split as the task needs, by code. Pairs are a function of
(task, n, seed). This file imports no other file of ours: a tokenizer comes as its `encode`.
"""

import random
from typing import NamedTuple

from storage.files import UserError


class Pair(NamedTuple):
    """One clean prompt, its corrupted twin, and the question. Token ids throughout."""

    clean: list  # (T,)
    corrupted: list  # (T,), equal length
    # where answers are read off: the logits there are asked for the token that belongs next (for addition:
    # there)
    positions: list
    right: list  # for each position, the tokens that count for
    wrong: list  # for each position, the tokens that count against


class Vocabulary(NamedTuple):
    """What a task must know about a model's tokens."""

    name: str  # 'gpt2', 'bytes', 'addition', or anything else
    size: int  # number of token ids
    encode: object  # str -> list of token ids; None where tokens are no text


def vocabulary(name, size=None):
    """The Vocabulary called 'gpt2' (through tiktoken), 'bytes', 'addition'; any other name needs its size."""
    if name == "gpt2":
        try:
            import tiktoken

            bpe = tiktoken.get_encoding("gpt2")
        except Exception as error:  # no network, a damaged cache: errors of many packages
            raise UserError(
                f"OpenAI's vocabulary cannot be fetched ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to "
                "a folder that holds it"
            ) from error
        return Vocabulary("gpt2", bpe.n_vocab, bpe.encode_ordinary)
    if name == "bytes":
        return Vocabulary("bytes", 256, lambda text: list(text.encode()))
    if name == "addition":
        return Vocabulary("addition", len(SYMBOLS), lambda text: [SYMBOLS.index(c) for c in text])
    return Vocabulary(name, size, None)


def one_token(words, encode, space=True):
    """Those words that are one token, with a space before them, as in the middle of a sentence."""
    return [word for word in words if len(encode(" " + word if space else word)) == 1]


# ------------------------------------------------------------------------------------------------------------
# GPT-2's vocabulary

NAMES = (
    "Aaron Adam Alan Alex Alice Amy Anderson Andre Andrew Andy Anna Anthony Arthur Austin Blake Brandon "
    "Brian Carter Charles Charlie Christian Christopher Clark "
    "Cole Collins Connor Crew Crystal Daniel David Dean Edward Elizabeth Emily Eric Eva Ford Frank George "
    "Georgia Graham Grant Henry Ian Jack Jacob Jake James Jamie Jane "
    "Jason Jay Jennifer Jeremy Jessica John Jonathan Jordan Joseph Joshua Justin Kate Kelly Kevin Kyle "
    "Laura Leon Lewis Lisa Louis Luke Madison Marco Marcus Maria Mark Martin "
    "Mary Matthew Max Michael Michelle Morgan Patrick Paul Peter Prince Rachel Richard River Robert Roman "
    "Rose Ruby Russell Ryan Sarah Scott Sean Simon Stephen Steven Sullivan "
    "Taylor Thomas Tom Tyler Victoria Warren William Xavier Zachary Zoe"
).split()
PLACES = (
    "store garden restaurant school hospital office house station market park beach library museum".split()
)
OBJECTS = "ring kiss bone basketball computer necklace drink snack book letter key ticket coat".split()
SCENES = (
    ("When {B} and {A} arrived at the {place},", "{B} gave a {thing} to"),
    ("While {B} and {A} were working at the {place},", "{B} gave a {thing} to"),
    ("After {B} and {A} had a long argument at the {place},", "{B} handed a {thing} to"),
    ("Then, {B} and {A} went to the {place}.", "{B} gave a {thing} to"),
    ("Last Sunday {B} and {A} met at the {place}.", "Before long {B} brought a {thing} to"),
    ("Friends since they were children, {B} and {A} sat in the {place}.", "{B} passed a {thing} to"),
)
DISTRACTION = (
    "The weather had been changing all morning and nobody was sure whether it would rain.",
    "A small dog was running across the street without paying any attention to the cars.",
    "Somebody had left the lights on and the doors open since the night before.",
    "There was music in the distance and it did not stop for several hours.",
    "The newspapers were full of stories about the election that week.",
    "It took a while before everything was ready and the others had gone home.",
)


def ioi(vocabulary, n, random, long=False):
    """Indirect object identification: who is not the giver?

    Half of the pairs name the giver first (BABA), half second (ABBA). Corrupted: a third person gives.
    """
    names, places, things = (one_token(words, vocabulary.encode) for words in (NAMES, PLACES, OBJECTS))
    scenes = [scene for scene in SCENES if not long or scene[0].endswith(".")]
    for number in range(n):
        meeting, giving = random.choice(scenes)
        if number % 2:
            meeting = meeting.replace("{B} and {A}", "{A} and {B}")
        between = random.sample(DISTRACTION, 3) if long else []
        a, b, c = random.sample(names, 3)
        place, thing = random.choice(places), random.choice(things)
        clean, corrupted = (
            " ".join([meeting.format(A=a, B=b, place=place), *between, giving.format(B=giver, thing=thing)])
            for giver in (b, c)
        )
        yield (
            vocabulary.encode(clean),
            vocabulary.encode(corrupted),
            vocabulary.encode(" " + a),
            vocabulary.encode(" " + b),
        )


def ioi_long(vocabulary, n, random):
    """IOI with three sentences between the clauses that have nothing to do with it."""
    return ioi(vocabulary, n, random, long=True)


NOUNS = (
    "war siege conflict revolution campaign expedition investigation project treaty alliance dynasty reign "
    "voyage strike trial debate drought plague famine construction "
    "dispute rebellion negotiations case marriage occupation operation partnership practice program "
    "progress raid reforms relationship rule sanctions study tour"
).split()


def greater_than(vocabulary, n, random):
    """A span cannot end before it began: after `from the year 17YY to the year 17` two digits above YY.

    Corrupted: from 1701, after which nearly all are right.
    """
    nouns, encode = one_token(NOUNS, vocabulary.encode), vocabulary.encode
    century = encode(" 17")
    digits = {
        year: encode(f" 17{year:02d}")[1:]
        for year in range(1, 100)
        if encode(f" 17{year:02d}")[:1] == century and len(encode(f" 17{year:02d}")) == 2
    }
    asked = [year for year in digits if 1 < year < max(digits)]
    if 1 not in digits or not asked:
        raise UserError("greater_than needs a vocabulary that splits 1701 into 17 and 01, as GPT-2's does")
    for _ in range(n):
        noun, start = random.choice(nouns), random.choice(asked)
        clean, corrupted = (
            encode(f"The {noun} lasted from the year 17{year:02d} to the year 17") for year in (start, 1)
        )
        yield (
            clean,
            corrupted,
            *(
                [token for year in sorted(digits) if (year > start) == later for token in digits[year]]
                for later in (True, False)
            ),
        )


ARGUMENTS = (
    "load size file last text mode path name line page user list item date time code view form link host "
    "port root test node type data rule task test unit sign copy view seed "
    "state value order index model input label token group event image field level cache query table frame "
    "color style"
).split()
WORDS = (
    "oil column piece crime population unit dark river song animal winter glass paper history garden light "
    "morning number story water market street window letter summer music"
).split()


def docstring(vocabulary, n, random):
    """Python's documentation repeats the arguments in the order of the signature: which comes third?

    Corrupted: other arguments in the signature.
    """
    if vocabulary.name == "bytes":
        yield from docstring_bytes(vocabulary, n, random)
        return
    # what is said names no argument
    names, words = (
        sorted(set(one_token(group, vocabulary.encode))) for group in (ARGUMENTS, set(WORDS) - set(ARGUMENTS))
    )
    for _ in range(n):
        function, *chosen = random.sample(names, 10)
        true, other = chosen[:5], chosen[5:9]
        said = [" ".join(random.sample(words, 2)) for _ in range(3)]
        # the corrupted signature keeps nothing of what the docstring goes on to say: the first two names
        # there are gone as well
        clean, corrupted = (
            vocabulary.encode(
                f'def {function}(self, {", ".join(signature)}):\n    """{said[0]}\n\n    :param {true[0]}: '
                f'{said[1]}\n    :param {true[1]}: {said[2]}\n    :param'
            )
            for signature in (true, other + [true[4]])
        )
        yield (
            clean,
            corrupted,
            vocabulary.encode(" " + true[2]),
            vocabulary.encode(" " + " ".join([true[0], true[1], true[3], *other])),
        )


# ------------------------------------------------------------------------------------------------------------
# any vocabulary


def copy(vocabulary, n, random, length=12):
    """A random sequence, and the beginning of it again: what comes next?

    (Induction.) Corrupted: another first half, so that there is nothing to copy.
    """
    alphabet = (
        [ord(c) for c in "abcdefghijklmnopqrstuvwxyz"]
        if vocabulary.name == "bytes"
        else range(vocabulary.size)
    )
    if len(alphabet) < 2 * length:
        raise UserError(f"copy needs {2 * length} different tokens, this vocabulary has {len(alphabet)}")
    for _ in range(n):
        tokens = random.sample(alphabet, 2 * length)
        first, other, again = tokens[:length], tokens[length:], random.randint(length // 2, length - 1)
        yield first + first[:again], other + first[:again], [first[again]], [other[again]]


# ------------------------------------------------------------------------------------------------------------
# the addition model

SYMBOLS = "0123456789+=?"  # ADDITION_TOKENS: a test compares them


def sum_row(a, b, vocabulary):
    return vocabulary.encode(f"{a:02d}+{b:02d}=?????"), [int(digit) for digit in f"{a + b:05d}"]


def addition(vocabulary, n, random):
    """Two-digit sums, all digits asked at once.

    Corrupted: another sum; the digits in which the two answers differ count.
    """
    while n:
        (clean, right), (corrupted, wrong) = (
            sum_row(random.randrange(100), random.randrange(100), vocabulary) for _ in range(2)
        )
        differ = [place for place in range(5) if right[place] != wrong[place]]
        if differ:
            n -= 1
            yield (
                clean,
                corrupted,
                [[right[place]] for place in differ],
                [[wrong[place]] for place in differ],
                [6 + place for place in differ],
            )


def carry(vocabulary, n, random):
    """Carry or none, all else equal: the same tens in both operands and the same units digit of the sum, so
    that of the answer the tens digit alone differs.

    Drawn until they fit: units that add up to ten and more, and units that add up to ten less; no carry into
    the hundreds.
    """
    while n:
        tens_a, tens_b = random.randrange(9), random.randrange(9)
        with_carry = [random.randrange(10) for _ in range(2)]
        without = [random.randrange(10) for _ in range(2)]
        if tens_a + tens_b < 9 and sum(with_carry) >= 10 and sum(without) == sum(with_carry) - 10:
            n -= 1
            (clean, right), (corrupted, wrong) = (
                sum_row(10 * tens_a + units[0], 10 * tens_b + units[1], vocabulary)
                for units in (with_carry, without)
            )
            yield clean, corrupted, [[right[3]]], [[wrong[3]]], [6 + 3]


# ------------------------------------------------------------------------------------------------------------
# bytes: the model of Python code


def quote(vocabulary, n, random):
    """Close the string with the quote that opened it. Corrupted: the other quote opened it."""
    for _ in range(n):
        name, text = random.choice(ARGUMENTS), " ".join(random.sample(WORDS, random.randint(1, 3)))
        before = random.choice(
            ("    {name} = ", "    print(", "    return ", "    raise ValueError(", "{name}[")
        ).format(name=name)
        mark = random.choice("\"'")
        other = "'" if mark == '"' else '"'
        yield (
            *(vocabulary.encode(before + opening + text) for opening in (mark, other)),
            vocabulary.encode(mark),
            vocabulary.encode(other),
        )


def bracket(vocabulary, n, random):
    """Two brackets of different kinds are open: which must be closed first?

    Corrupted: they were opened the other way round.
    """
    for _ in range(n):
        variable, outer, inner, last = (random.choice(ARGUMENTS) for _ in range(4))
        opening = random.choice(("([", "[("))
        closing = {"(": ")", "[": "]"}
        clean, corrupted = (
            vocabulary.encode(f"    {variable} = {outer}{first}{inner}{second}{last}")
            for first, second in (opening, opening[::-1])
        )
        yield clean, corrupted, vocabulary.encode(closing[opening[1]]), vocabulary.encode(closing[opening[0]])


def docstring_bytes(vocabulary, n, random):
    """Docstring, short enough for 128 bytes: the answer is the first byte of the third argument, the wrong
    ones those of the others. No two begin alike.
    """
    names = sorted({name for name in ARGUMENTS if len(name) == 4})
    for _ in range(n):
        chosen = []
        while len(chosen) < 6:
            name = random.choice(names)
            if name[0] not in [other[0] for other in chosen]:
                chosen.append(name)
        true, other = chosen[:3], chosen[3:]
        clean, corrupted = (
            vocabulary.encode(
                f'def run({", ".join(signature)}):\n    """{random_word}\n\n    :param {true[0]}: a\n    '
                f':param {true[1]}: b\n    :param '
            )
            for random_word in [random.choice(WORDS)]
            for signature in (true, other)
        )
        yield (
            clean,
            corrupted,
            vocabulary.encode(true[2][0]),
            vocabulary.encode("".join(name[0] for name in (true[0], true[1], *other))),
        )


# ------------------------------------------------------------------------------------------------------------
# all of them

PROBABILITY, LOGIT = "probability difference", "logit difference"
# vocabularies of words; what does not split as a task needs is left out by the task
WORDS_OF = ("gpt2", "olmo", "olmo2")
TASKS = {  # name: (pairs, the vocabularies it can be posed in, None being any; metric)
    "ioi": (ioi, WORDS_OF, LOGIT),
    "ioi_long": (ioi_long, WORDS_OF, LOGIT),
    "greater_than": (greater_than, WORDS_OF, PROBABILITY),
    "docstring": (docstring, ("bytes", *WORDS_OF), LOGIT),
    "copy": (copy, ("bytes", "gpt2", None), LOGIT),
    "addition": (addition, ("addition",), LOGIT),
    "carry": (carry, ("addition",), LOGIT),
    "quote": (quote, ("bytes",), LOGIT),
    "bracket": (bracket, ("bytes",), LOGIT),
}


def fitting(vocabulary_name):
    """Names of the tasks that can be posed in a vocabulary."""
    return [
        name
        for name, (_, fits, _) in TASKS.items()
        if vocabulary_name in fits or None in fits and vocabulary_name != "addition"
    ]


def make_pairs(task, n, seed, vocabulary):
    """n Pairs of a task, and its metric ('logit difference' or 'probability difference'). vocabulary: a
    Vocabulary, the model's.

    Raises UserError if there is no such task, or if it cannot be posed in this vocabulary.
    """
    if task not in TASKS:
        raise UserError(f"there is no task {task!r}. There are {', '.join(TASKS)}")
    if task not in fitting(vocabulary.name):
        raise UserError(
            f"the task {task} cannot be posed in the vocabulary {vocabulary.name!r}. What fits it: "
            f"{', '.join(fitting(vocabulary.name))}"
        )
    pairs, _, metric = TASKS[task]
    found = []
    for clean, corrupted, right, wrong, *several in pairs(vocabulary, n, random.Random(f"{task} {seed}")):
        if len(clean) != len(corrupted) or clean == corrupted:
            raise UserError(
                f"{task}: the clean and the corrupted prompt of a pair must differ and have the same number "
                f"of tokens, not {len(clean)} and {len(corrupted)}: {clean}, {corrupted}"
            )
        positions, right, wrong = (
            (several[0], right, wrong) if several else ([len(clean) - 1], [right], [wrong])
        )
        found.append(Pair(clean, corrupted, positions, right, wrong))
    return found, metric


def add_arguments(parser):
    parser.add_argument("task", nargs="?", help=", ".join(TASKS))
    parser.add_argument("--n", type=int, default=5, help="pairs of prompts to print")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--vocabulary", choices=["gpt2", "bytes", "addition"], help="default: the first that the task fits"
    )


def run(options, settings):
    """`analyze.py tasks`: all tasks, or prompts of one."""
    if options.n < 1:
        raise UserError("--n must be at least 1")
    if options.task is None:
        for name, (pairs, fits, metric) in TASKS.items():
            fitting_names = ", ".join(fit or "any" for fit in fits)
            print(f"{name:13} {fitting_names:16} {metric:24} {pairs.__doc__.splitlines()[0]}")
        return
    if options.task not in TASKS:
        raise UserError(f"there is no task {options.task!r}. There are {', '.join(TASKS)}")
    tokens = vocabulary(options.vocabulary or TASKS[options.task][1][0])
    pairs, metric = make_pairs(options.task, options.n, options.seed, tokens)
    print(f"{options.task}, {metric}")
    show = decoder(tokens.name)
    for pair in pairs:
        print(f"\nclean      {show(pair.clean)!r}\ncorrupted  {show(pair.corrupted)!r}")
        for position, right, wrong in zip(pair.positions, pair.right, pair.wrong):
            print(f"at {position:3d}     right {first_few(right, show)}; wrong {first_few(wrong, show)}")


def decoder(name):
    """The function that turns token ids of the vocabulary of that name into words."""
    if name == "gpt2":
        import tiktoken

        return tiktoken.get_encoding("gpt2").decode
    if name == "bytes":
        return lambda ids: bytes(ids).decode(errors="replace")
    return lambda ids: "".join(SYMBOLS[i] for i in ids)


def first_few(ids, show, most=4):
    """The first tokens of a list, in quotes."""
    words = ", ".join(repr(show([i])) for i in ids[:most])
    return words + " ..." if len(ids) > most else words
