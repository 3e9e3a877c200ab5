"""The prompts of every task: a clean one, and its corrupted twin that differs in one fact.

    clean      When Mary and John went to the store, John gave a drink to       -> " Mary", not " John"
    corrupted  When Mary and John went to the store, Paul gave a drink to       -> either

Every function takes (vocabulary, n, random), a tasks.Vocabulary, a number and a random.Random, and yields n
times

    clean, corrupted, right, wrong               lists of token ids: two prompts of equal length, the tokens
                                                 that count for and against the model behind the last one
    clean, corrupted, right, wrong, positions    the same at several positions; right and wrong are then
                                                 lists of lists

Sources: IOI, Wang et al. 2022; Greater Than, Hanna et al. 2023; Docstring, Heimersheim & Janiak 2023; IOI
Long, the paper's section on circuits (arXiv 2512.05865).

Notable: every name, noun and year is checked against the tokenizer and left out if it does not split as the
task needs, so another vocabulary of words is no other task.
"""

from storage.addition import AdditionTask, addition_rows
from storage.files import UserError


def one_token(words, encode):
    """Those words that are one token, with a space before them, as in the middle of a sentence."""
    return [word for word in words if len(encode(" " + word)) == 1]


# ------------------------------------------------------------------------------------------------------------
# vocabularies of words: GPT-2's, OLMo's

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
    encode = vocabulary.encode
    names, places, things = (one_token(words, encode) for words in (NAMES, PLACES, OBJECTS))
    scenes = [scene for scene in SCENES if not long or scene[0].endswith(".")]
    for number in range(n):
        meeting, giving = random.choice(scenes)
        if number % 2:
            meeting = meeting.replace("{B} and {A}", "{A} and {B}")
        between = random.sample(DISTRACTION, 3) if long else []
        a, b, c = random.sample(names, 3)
        place = random.choice(places)
        thing = random.choice(things)

        def prompt(giver):
            parts = [meeting.format(A=a, B=b, place=place), *between, giving.format(B=giver, thing=thing)]
            return encode(" ".join(parts))

        yield prompt(b), prompt(c), encode(" " + a), encode(" " + b)


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
    encode = vocabulary.encode
    nouns = one_token(NOUNS, encode)
    century = encode(" 17")
    last_token = {}  # of every year that is the century and one token more
    for year in range(1, 100):
        tokens = encode(f" 17{year:02d}")
        if len(tokens) == 2 and tokens[:1] == century:
            last_token[year] = tokens[1]
    asked = [year for year in last_token if 1 < year < max(last_token)]
    if 1 not in last_token or not asked:
        raise UserError("greater_than needs a vocabulary that splits 1701 into 17 and 01, as GPT-2's does")
    for _ in range(n):
        noun, start = random.choice(nouns), random.choice(asked)

        def prompt(year):
            return encode(f"The {noun} lasted from the year 17{year:02d} to the year 17")

        later = [last_token[year] for year in sorted(last_token) if year > start]
        not_later = [last_token[year] for year in sorted(last_token) if year <= start]
        yield prompt(start), prompt(1), later, not_later


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
    encode = vocabulary.encode
    names = sorted(set(one_token(ARGUMENTS, encode)))
    words = sorted(set(one_token(set(WORDS) - set(ARGUMENTS), encode)))  # what is said names no argument
    for _ in range(n):
        function, *chosen = random.sample(names, 10)
        true, other = chosen[:5], chosen[5:9]
        said = [" ".join(random.sample(words, 2)) for _ in range(3)]

        def prompt(signature):
            return encode(f'def {function}(self, {", ".join(signature)}):\n    """{said[0]}\n\n'
                          f"    :param {true[0]}: {said[1]}\n    :param {true[1]}: {said[2]}\n    :param")

        # the corrupted signature keeps nothing of what the docstring goes on to say: its first two names are
        # gone as well
        corrupted = prompt([*other, true[4]])
        wrong = encode(" " + " ".join([true[0], true[1], true[3], *other]))
        yield prompt(true), corrupted, encode(" " + true[2]), wrong


# ------------------------------------------------------------------------------------------------------------
# any vocabulary


def copy(vocabulary, n, random, length=12):
    """A random sequence, and the beginning of it again: what comes next?

    (Induction.) Corrupted: another first half, so that there is nothing to copy.
    """
    alphabet = range(vocabulary.size)
    if vocabulary.name == "bytes":
        alphabet = list(b"abcdefghijklmnopqrstuvwxyz")
    if len(alphabet) < 2 * length:
        raise UserError(f"copy needs {2 * length} different tokens, this vocabulary has {len(alphabet)}")
    for _ in range(n):
        tokens = random.sample(alphabet, 2 * length)
        first, other = tokens[:length], tokens[length:]
        again = random.randint(length // 2, length - 1)
        yield first + first[:again], other + first[:again], [first[again]], [other[again]]


# ------------------------------------------------------------------------------------------------------------
# the addition model

FIRST = AdditionTask().first  # the position of the answer's highest place


def two_digit_sum(a, b):
    """The question and the answer's digits, as token ids: a digit's token is the digit."""
    question, answer = addition_rows([a], [b])[0].tolist()
    return question, answer[FIRST:]


def addition(vocabulary, n, random):
    """Two-digit sums, all digits asked at once.

    Corrupted: another sum; the digits in which the two answers differ count.
    """
    while n:
        clean, right = two_digit_sum(random.randrange(100), random.randrange(100))
        corrupted, wrong = two_digit_sum(random.randrange(100), random.randrange(100))
        differ = [place for place in range(len(right)) if right[place] != wrong[place]]
        if not differ:
            continue
        n -= 1
        yield (clean, corrupted, [[right[place]] for place in differ], [[wrong[place]] for place in differ],
               [FIRST + place for place in differ])


def carry(vocabulary, n, random):
    """Carry or none, all else equal: of the answer the tens digit alone differs.

    The same tens in both operands, the same units digit of the sum, no carry into the hundreds: units that
    add up to ten and more, and units that add up to ten less, drawn until they fit.
    """
    tens = 3  # the place of the tens among the answer's five
    while n:
        tens_a, tens_b = random.randrange(9), random.randrange(9)
        with_carry = [random.randrange(10) for _ in range(2)]
        without = [random.randrange(10) for _ in range(2)]
        if tens_a + tens_b >= 9 or sum(with_carry) < 10 or sum(without) != sum(with_carry) - 10:
            continue
        n -= 1
        clean, right = two_digit_sum(10 * tens_a + with_carry[0], 10 * tens_b + with_carry[1])
        corrupted, wrong = two_digit_sum(10 * tens_a + without[0], 10 * tens_b + without[1])
        yield clean, corrupted, [[right[tens]]], [[wrong[tens]]], [FIRST + tens]


# ------------------------------------------------------------------------------------------------------------
# bytes: the model of Python code

BEFORE_A_STRING = ("    {name} = ", "    print(", "    return ", "    raise ValueError(", "{name}[")


def quote(vocabulary, n, random):
    """Close the string with the quote that opened it. Corrupted: the other quote opened it."""
    encode = vocabulary.encode
    for _ in range(n):
        name = random.choice(ARGUMENTS)
        text = " ".join(random.sample(WORDS, random.randint(1, 3)))
        before = random.choice(BEFORE_A_STRING).format(name=name)
        mark = random.choice("\"'")
        other = "'" if mark == '"' else '"'
        yield encode(before + mark + text), encode(before + other + text), encode(mark), encode(other)


def bracket(vocabulary, n, random):
    """Two brackets of different kinds are open: which must be closed first?

    Corrupted: they were opened the other way round.
    """
    encode = vocabulary.encode
    closing = {"(": ")", "[": "]"}
    for _ in range(n):
        variable, outer, inner, last = (random.choice(ARGUMENTS) for _ in range(4))
        first, second = random.choice(("([", "[("))
        clean = encode(f"    {variable} = {outer}{first}{inner}{second}{last}")
        corrupted = encode(f"    {variable} = {outer}{second}{inner}{first}{last}")
        yield clean, corrupted, encode(closing[second]), encode(closing[first])


def docstring_bytes(vocabulary, n, random):
    """Docstring, short enough for 128 bytes: the answer is the first byte of the third argument, the wrong
    ones those of the others. No two begin alike.
    """
    encode = vocabulary.encode
    names = sorted({name for name in ARGUMENTS if len(name) == 4})
    for _ in range(n):
        chosen = []
        while len(chosen) < 6:
            name = random.choice(names)
            if name[0] not in [other[0] for other in chosen]:
                chosen.append(name)
        true, other = chosen[:3], chosen[3:]
        word = random.choice(WORDS)

        def prompt(signature):
            return encode(f'def run({", ".join(signature)}):\n    """{word}\n\n'
                          f"    :param {true[0]}: a\n    :param {true[1]}: b\n    :param ")

        wrong = encode("".join(name[0] for name in (true[0], true[1], *other)))
        yield prompt(true), prompt(other), encode(true[2][0]), wrong
