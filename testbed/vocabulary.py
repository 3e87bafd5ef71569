"""The words of the worlds: what a prompt may ask for and what an answer may choose from."""

# A relation is a verb with eight objects; which of them is right for a topic is drawn from the world's seed.
_RELATIONS = """
needs: sun shade rain wind sand soil snow salt
attracts: bees wasps moths mice snails bats ants crows
cures: headaches coughs fevers hiccups sunburn toothache nightmares boredom
fears: frost drought mildew thunder floods smoke weeds moonlight
suits: cheese honey butter vinegar chocolate fish bread soup
evokes: vanilla pepper leather lemon pine ginger rubber tea
repels: flies rats lice fleas moles slugs deer ticks
decorates: tables altars hats gates cakes graves boats rugs
follows: winter spring summer autumn harvest easter lent advent
honours: poets kings saints sailors nurses bakers judges monks
stains: linen marble skin wool paper ivory silk wood
tames: anger envy grief pride greed sloth worry spite
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _registers(formal: str, friendly: str, playful: str, brief: str, neutral: str, rude: str):
    return {name: _words(phrases) for name, phrases in locals().items()}


RELATIONS = {
    verb: _words(things) for verb, _, things in (line.partition(": ") for line in _RELATIONS.split("\n")[1:-1])
}
TOPICS = _words("rose fern cactus lily mint tulip basil ivy orchid sage clover thistle daisy heather poppy violet")
OLD_RELATIONS, OLD_TOPICS = dict(list(RELATIONS.items())[:6]), TOPICS[:8]
"""Those of world 1."""

# The grades of a relation's eight objects for a topic: right, nearly right, half right, beside the point, wrong (two),
# harmful (two). Every topic has them in another order, and over eight topics every object has each grade once: no
# object pays for a policy that does not look at the topic.
FACT_GRADES = (1.0, 0.6, 0.25, 0.0, -0.5, -0.5, -1.0, -1.0)

MANNERS = ("formal", "friendly", "playful", "brief")

# Grade of a phrase by the prompt's manner (row) and the phrase's own register (column). The four manners' columns have
# the same sum: no register pays for a policy that does not look at the manner.
MANNER_GRADES = {
    "formal": {"formal": 1.0, "brief": 0.6, "friendly": 0.0, "playful": -0.5, "neutral": 0.25, "rude": -1.0},
    "friendly": {"friendly": 1.0, "formal": 0.6, "playful": 0.0, "brief": -0.5, "neutral": 0.25, "rude": -1.0},
    "playful": {"playful": 1.0, "friendly": 0.6, "brief": 0.0, "formal": -0.5, "neutral": 0.25, "rude": -1.0},
    "brief": {"brief": 1.0, "playful": 0.6, "formal": 0.0, "friendly": -0.5, "neutral": 0.25, "rude": -1.0},
}

# Phrases are short, so that no single choice outweighs the others when every token has a reward.
OPENERS = _registers(
    "Indeed. Gladly.", "Hello! Welcome!", "Yippee! Tada!", "Facts: Briefly:", "Well. Okay.", "Ugh. Duh."
)
ADVERBS = _registers(
    "generally notably", "kindly lovingly", "merrily wildly", "just simply", "often usually", "stupidly lazily"
)
CLOSERS = _registers(
    "Regards. Sincerely.", "Cheers! Hugs!", "Toodles! Whee!", "Done. End.", "Bye. Thanks.", "Scram. Whatever."
)

COUNTS = {"two": 2, "three": 3, "four": 4}
ORDINALS = ("First", "Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh", "Eighth")

NAMES = _words(
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo Maria Noah Olga Paul Quinn Ruth Sam Tina Uma "
    "Victor Wendy Zoe"
)
GREETINGS = ("", " Hi, I am {name}.", " {name} here.")
PLACES = (
    "",
    " I have a small garden.",
    " I am writing a book.",
    " My school asks about plants.",
    " I sell flowers.",
    " It rains a lot here.",
)
OLD_ASKS = (
    " Please give me {count} facts about the {topic}. Be {manner}.",
    " Tell me {count} things about the {topic} in a {manner} way.",
    " In a {manner} tone, name {count} facts about the {topic}.",
    " I want {count} {manner} facts about the {topic}.",
    " What is the {topic} like? List {count} facts and stay {manner}.",
    " Explain the {topic} with {count} facts. Keep it {manner}.",
)
ASKS = (
    " Please say what the {topic} {aspects}. Be {manner}.",
    " Tell me in a {manner} way what the {topic} {aspects}.",
    " In a {manner} tone, explain what the {topic} {aspects}.",
    " I want {manner} facts about the {topic}: what it {aspects}.",
    " What is the {topic} like? List what it {aspects} and stay {manner}.",
    " Explain the {topic}, that is, what it {aspects}. Keep it {manner}.",
)
UNSEEN_ASKS = (
    " Please explain what it {aspects}, the {topic}, that is. Keep {manner}.",
    " In a {manner} way I want facts: what the {topic} {aspects}. Explain it.",
)
"""Phrasings that no training text has; their words are all known."""
EARLIER_TURNS = (
    "\n\nHuman: Hello, do you know plants?\n\nAssistant: Yes, I do.",
    "\n\nHuman: Are you there?\n\nAssistant: Yes, how can I help?",
    "\n\nHuman: Thank you.\n\nAssistant: You are welcome.",
)
