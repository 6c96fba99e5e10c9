"""Write the synthetic product-review data set used by the fine-tuning examples.

Every row is put together from the templates and word lists in this file; no real product and no real
customer's words are involved. The same seed always gives the same bytes.

    python scripts/make_reviews.py [--seed 7] [--out jlora/quickstart]

A product is a made-up name, a kind of thing and three of that kind's features. Each feature knows how a
shop would list it, what a pleased customer would say about it and what an annoyed one would. A review is an
opening, a remark about the product's own features, an aside and a verdict, all in one mood. Products in
heldout.jsonl never occur in train.jsonl, and some of them are of kinds that train.jsonl does not have at all.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "jlora" / "quickstart"
MOODS = ("positive", "neutral", "negative")
TRAIN_VARIANTS = 2
HELDOUT_VARIANTS = 1
PROMPT_PRODUCTS = 2
MIN_WORDS, MAX_WORDS = 25, 55
MAX_TRIES = 2000

Row = dict[str, str]


@dataclass(frozen=True)
class Feature:
    """One selling point: the shop's words, a pleased remark and an annoyed remark (both are clauses)."""

    listing: str
    good: str
    bad: str


@dataclass(frozen=True)
class Kind:
    """A kind of product. `phrase` is the shop's wording, `noun` what a customer calls it."""

    category: str
    phrase: str
    noun: str
    plural: bool
    names: tuple[str, ...]
    features: tuple[Feature, ...]
    heldout_only: bool = False


@dataclass(frozen=True)
class Product:
    """A named product with the three features its description lists."""

    name: str
    kind: Kind
    features: tuple[Feature, ...]
    description: str


F = Feature

# fmt: off
KINDS: tuple[Kind, ...] = (
    Kind(
        "kitchen", "a drip coffee maker", "coffee maker", False,
        ("Morrow Five", "Dripwell 8", "Harbor Brew Mini"),
        (
            F("a glass carafe", "the carafe pours without dripping", "the carafe dribbles every time I pour"),
            F("a keep-warm plate", "the plate keeps a second cup nice and hot",
              "the plate only keeps the coffee lukewarm"),
            F("a reusable filter", "the reusable filter saves me buying paper ones",
              "the reusable filter lets grounds into my cup"),
            F("a 24-hour timer", "the timer means coffee is ready when I get up",
              "the timer forgets its setting all the time"),
        ),
    ),
    Kind(
        "kitchen", "an electric kettle", "kettle", False,
        ("Pellow Kettle", "Tidewater 17", "Stovely Quick Boil"),
        (
            F("a blue water-level window", "the water window is easy to read", "the water window fogs up"),
            F("a cordless base", "it lifts off the base with one hand",
              "the base slides around on the counter"),
            F("a removable limescale filter", "the filter catches the scale and rinses clean",
              "the filter pops out when I pour"),
            F("a soft-grip handle", "the handle stays cool", "the handle gets uncomfortably warm"),
        ),
    ),
    Kind(
        "kitchen", "a two-slice toaster", "toaster", False,
        ("Crumbly Duo", "Hearthside 2", "Goldcrust Slim"),
        (
            F("extra-wide slots", "the wide slots take thick bread and bagels",
              "the wide slots let thin bread lean over and burn"),
            F("a pull-out crumb tray", "the crumb tray slides out easily", "the crumb tray sticks halfway"),
            F("a defrost button", "the defrost button works on bread straight from the freezer",
              "the defrost button leaves the middle cold"),
            F("six browning levels", "the browning dial is pretty accurate",
              "the browning levels all come out the same"),
        ),
    ),
    Kind(
        "kitchen", "a digital kitchen scale", "scale", False,
        ("Pinchwell Scale", "Gramly Flat"),
        (
            F("a glass top", "the glass top wipes clean in a second",
              "the glass top shows every fingerprint"),
            F("a large backlit display", "the display is easy to read",
              "the display is hidden by a big bowl"),
            F("a zero button", "the zero button makes it easy to weigh one thing after another",
              "the zero button needs two or three presses"),
            F("a hanging hook", "the hook keeps it off my counter", "the hook feels flimsy"),
        ),
        heldout_only=True,
    ),
    Kind(
        "audio", "a portable Bluetooth speaker", "speaker", False,
        ("Pebble Tone", "Lowtide Go", "Hummbox 2"),
        (
            F("a 12-hour battery", "the battery lasts me most of the week",
              "the battery never gets close to 12 hours"),
            F("a splash-proof shell", "it has survived plenty of kitchen splashes",
              "the splash-proof shell already has a loose seam"),
            F("a carry strap", "the strap is handy for hanging it on a hook", "the strap started to fray"),
            F("a built-in microphone", "the microphone is clear on calls",
              "the microphone makes me sound far away"),
        ),
    ),
    Kind(
        "audio", "a pair of wireless earbuds", "earbuds", True,
        ("Nubbin Air", "Quietleaf Buds", "Tinwhistle S"),
        (
            F("a pocket charging case", "the charging case fits in my jeans",
              "the charging case lid feels loose"),
            F("touch controls", "the touch controls work every time",
              "the touch controls pause my music when I fix my hair"),
            F("three sizes of ear tips", "the small ear tips fit me really well",
              "none of the ear tips fit me properly"),
            F("noise reduction", "the noise reduction takes the edge off the bus",
              "the noise reduction adds a faint hiss"),
        ),
    ),
    Kind(
        "luggage", "a hard-shell cabin suitcase", "suitcase", False,
        ("Rolla Cabin", "Farewell 38", "Gatewise Shell"),
        (
            F("four spinner wheels", "the wheels roll smoothly through the airport",
              "one of the wheels squeaks and pulls to the left"),
            F("a combination lock", "the lock was easy to set", "the lock jams on the last number"),
            F("a telescopic handle", "the handle locks firmly at the right height", "the handle wobbles"),
            F("a zipped divider", "the divider keeps shirts and shoes apart",
              "the divider zip catches on the lining"),
        ),
    ),
    Kind(
        "luggage", "a 30-liter travel backpack", "backpack", False,
        ("Wayfold 30", "Oakline Carry", "Northbus Pack"),
        (
            F("a padded laptop sleeve", "the laptop sleeve feels safe and snug",
              "the laptop sleeve is too tight for my laptop"),
            F("two bottle pockets", "the bottle pockets hold a big bottle",
              "my bottle falls out of the pockets when I bend over"),
            F("a chest strap", "the chest strap takes weight off my shoulders",
              "the chest strap clip keeps popping open"),
            F("a rain cover", "the rain cover kept everything dry",
              "the rain cover does not reach the bottom of the bag"),
        ),
    ),
    Kind(
        "luggage", "a hanging toiletry bag", "toiletry bag", False,
        ("Fernhook Bag", "Washaway Roll"),
        (
            F("a swivel hook", "the hook fits over any towel rail", "the hook bends when the bag is full"),
            F("a wipe-clean lining", "the lining wipes clean after a spill",
              "the lining holds on to every stain"),
            F("four mesh pockets", "the mesh pockets keep small things in sight",
              "the mesh pockets snag on everything"),
            F("a two-way zip", "the zip runs smoothly", "the zip sticks at the corners"),
        ),
        heldout_only=True,
    ),
    Kind(
        "shoes", "a pair of trail running shoes", "shoes", True,
        ("Trailhop 2", "Mosswalker", "Ridge Hare"),
        (
            F("grippy rubber soles", "the soles grip well on wet ground", "the soles slip on wet rock"),
            F("a breathable mesh upper", "the mesh keeps my feet cool", "the mesh lets in every bit of grit"),
            F("padded heel collars", "the padded heels feel soft from the start", "the padded heels rub"),
            F("quick-pull laces", "the quick-pull laces stay put",
              "the quick-pull laces work themselves loose"),
        ),
    ),
    Kind(
        "shoes", "a pair of house slippers", "slippers", True,
        ("Hearthfeet", "Dozy Mule", "Woolly Step"),
        (
            F("memory-foam insoles", "the memory foam is still springy", "the memory foam went flat"),
            F("a fleece lining", "the fleece is cozy without being sweaty", "the fleece sheds on my socks"),
            F("non-slip soles", "the soles do not slide on our tiles", "the soles squeak on our tiles"),
            F("a fold-down heel", "the fold-down heel is great for slipping out the door",
              "the fold-down heel will not stay down"),
        ),
    ),
    Kind(
        "bedding", "a set of cotton bed sheets", "sheets", True,
        ("Plainfield Cotton", "Larkmoor Sheets", "Slumber Row"),
        (
            F("deep fitted corners", "the corners stay tucked in all night",
              "the corners pop off in the night"),
            F("two matching pillowcases", "the pillowcases are a generous size",
              "the pillowcases are a tight fit"),
            F("a brushed finish", "the brushed finish feels soft on the skin",
              "the brushed finish started to pill"),
            F("fade-resistant color", "the color has held up in the wash",
              "the color looked washed out after one wash"),
        ),
    ),
    Kind(
        "bedding", "a memory-foam pillow", "pillow", False,
        ("Nodwell Pillow", "Cloverhead", "Drift Contour"),
        (
            F("a contoured shape", "the contoured shape has been kind to my neck",
              "the contoured shape made my neck stiff"),
            F("a washable bamboo cover", "the cover washes well", "the cover shrank in the wash"),
            F("a cooling gel layer", "the gel layer stays cool",
              "the gel layer makes no difference on a warm night"),
            F("removable foam inserts", "taking one insert out got the height just right",
              "the inserts bunch up on one side"),
        ),
    ),
    Kind(
        "garden", "an expandable garden hose", "hose", False,
        ("Snakeby 50", "Greenreel Flex", "Puddle Lane"),
        (
            F("brass connectors", "the brass connectors do not leak", "the brass connectors drip at the tap"),
            F("an eight-pattern spray nozzle", "the spray patterns are actually useful",
              "most of the spray patterns look the same"),
            F("a wall hanger", "the wall hanger keeps it tidy", "the wall hanger came with the wrong screws"),
            F("a kink-resistant weave", "it has not kinked once", "it kinks as soon as I turn a corner"),
        ),
    ),
    Kind(
        "garden", "a pair of pruning shears", "shears", True,
        ("Thornbury Snips", "Bramble 8", "Hedgewife Pruners"),
        (
            F("carbon-steel blades", "the blades go through rose stems cleanly", "the blades chew the stems"),
            F("a safety catch", "the safety catch clicks firmly shut",
              "the safety catch slips while I am cutting"),
            F("cushioned grips", "the grips are easy on my hands", "the grips twist around"),
            F("a belt pouch", "the belt pouch is a nice extra", "the belt pouch stitching came undone"),
        ),
    ),
    Kind(
        "garden", "a ten-liter watering can", "watering can", False,
        ("Dewdrop Ten", "Pottery Lane Can", "Rainly Long Spout"),
        (
            F("a removable rose", "the rose gives a gentle shower", "the rose falls off when I tip it"),
            F("a long spout", "the long spout reaches the back pots", "the long spout drips down the side"),
            F("two handles", "the two handles make it easy to carry when full",
              "the top handle digs into my fingers"),
            F("fill marks on the side", "the fill marks help with plant feed",
              "the fill marks are hard to see"),
        ),
    ),
    Kind(
        "pets", "an orthopedic dog bed", "dog bed", False,
        ("Snoozehound L", "Barkley Rest", "Old Paw Lounger"),
        (
            F("a thick foam base", "the foam base holds its shape", "the foam base has a dip in it already"),
            F("a zip-off washable cover", "the cover comes off and washes easily",
              "the cover is a battle to get back on"),
            F("raised edges", "our dog loves resting his head on the raised edges",
              "the raised edges flop over when our dog leans on them"),
            F("a non-slip underside", "it stays put on the wood floor", "it slides across the wood floor"),
        ),
    ),
    Kind(
        "pets", "a pet water fountain", "fountain", False,
        ("Lapwell 2", "Whisker Spring", "Purrfall Mini"),
        (
            F("a quiet pump", "the pump is so quiet I forget it is on", "the pump hums all night"),
            F("a carbon filter", "the filter keeps the water fresh", "the filter clogs up with fur"),
            F("a stainless-steel top", "the steel top goes in the dishwasher",
              "the steel top shows every water mark"),
            F("a low-water light", "the low-water light is easy to spot",
              "the low-water light is far too dim"),
        ),
    ),
    Kind(
        "pets", "a tall cat scratching post", "scratching post", False,
        ("Clawford Tower", "Sisal Sam"),
        (
            F("a thick sisal wrap", "the sisal is holding up to daily scratching",
              "the sisal is coming unglued"),
            F("a heavy square base", "the base does not tip when the cat jumps",
              "the base wobbles when the cat jumps"),
            F("a dangling toy", "the cat goes crazy for the dangling toy",
              "the dangling toy came off its string"),
            F("a plush top perch", "the cat naps on the perch every afternoon",
              "the perch sits a little crooked"),
        ),
        heldout_only=True,
    ),
    Kind(
        "toys", "a set of 80 building blocks", "blocks", True,
        ("Stackaroo 80", "Brickberry", "Tumble Town"),
        (
            F("rounded edges", "the rounded edges do not hurt when I step on one",
              "a few of the rounded edges were rough"),
            F("a lidded storage tub", "the tub makes cleanup quick", "the tub lid split"),
            F("snap-on wheels", "the wheels get used in every build", "the wheels keep popping off"),
            F("a picture idea book", "the idea book keeps the kids busy",
              "the idea book skips a lot of steps"),
        ),
    ),
    Kind(
        "toys", "a wooden train set", "train set", False,
        ("Pinewhistle Line", "Little Junction", "Choo Hollow"),
        (
            F("30 pieces of track", "the track pieces fit together well",
              "some of the track pieces do not line up"),
            F("magnetic couplings", "the magnets are strong enough for a long train",
              "the magnets are too weak to pull three cars"),
            F("a painted bridge", "the bridge is a big hit", "the paint on the bridge is chipping"),
            F("a station with a working crane", "the crane gets the most play time",
              "the crane snapped at the arm"),
        ),
    ),
    Kind(
        "phone", "a slim phone case", "case", False,
        ("Shellby Slim", "Guardlet", "Pocketbark"),
        (
            F("raised corners", "the raised corners saved my screen from a drop",
              "the raised corners collect pocket fluff"),
            F("a matte finish", "the matte finish is easy to hold", "the matte finish scratches easily"),
            F("a fold-out stand", "the stand is handy for recipes", "the stand is loose at the hinge"),
            F("a card slot", "the card slot holds my bus pass", "the card slot is too tight for one card"),
        ),
    ),
    Kind(
        "phone", "a 10,000 mAh power bank", "power bank", False,
        ("Juicebrick 10", "Spareday", "Topup Pebble"),
        (
            F("two USB ports", "both ports charge at a decent speed",
              "the second port charges really slowly"),
            F("a four-light battery gauge", "the battery lights are easy to trust",
              "the battery lights drop from four to one"),
            F("a built-in cable", "the built-in cable means one less thing to forget",
              "the built-in cable is too short to be useful"),
            F("a rubber shell", "the rubber shell shrugs off knocks", "the rubber shell smells odd"),
        ),
    ),
    Kind(
        "phone", "a dashboard phone mount", "phone mount", False,
        ("Gripster Dash", "Roadperch", "Clampy One"),
        (
            F("a suction base", "the suction base holds on bumpy roads",
              "the suction base lets go on bumpy roads"),
            F("a one-touch release", "the release button works with one hand", "the release button sticks"),
            F("an extending arm", "the arm puts the map right where I need it",
              "the arm sags with a big phone"),
            F("a rotating head", "the head turns easily for maps", "the head will not stay at an angle"),
        ),
    ),
    Kind(
        "fitness", "a yoga mat", "mat", False,
        ("Stillground Mat", "Lotusby 6", "Stretchwell Roll"),
        (
            F("a non-slip surface", "my hands do not slide on it", "my hands slide as soon as I sweat"),
            F("6 mm of cushioning", "the cushioning is kind to my knees",
              "the cushioning is thin under my knees"),
            F("printed alignment lines", "the alignment lines really help me",
              "the alignment lines are rubbing off"),
            F("a carry strap", "the strap makes it easy to take to class", "the strap is too short"),
        ),
    ),
    Kind(
        "fitness", "a pair of adjustable dumbbells", "dumbbells", True,
        ("Ironpair 10", "Homelift Duo", "Loadwell Set"),
        (
            F("screw-on collars", "the collars stay tight", "the collars loosen after a few reps"),
            F("textured grips", "the grips feel secure", "the grips are rough on my palms"),
            F("rubber-coated plates", "the rubber plates are gentle on the floor",
              "the rubber plates have a strong smell"),
            F("a storage tray", "the tray keeps everything together", "the tray cracked in one corner"),
        ),
    ),
    Kind(
        "lighting", "an LED desk lamp", "lamp", False,
        ("Lumenby Arc", "Deskglow 3", "Nightowl Bend"),
        (
            F("five brightness levels", "the lowest brightness is perfect for late evenings",
              "even the lowest brightness is too harsh"),
            F("a flexible neck", "the neck bends and stays where I put it", "the neck droops"),
            F("a USB charging port", "the USB port charges my phone overnight",
              "the USB port barely charges my phone"),
            F("touch controls", "the touch controls are simple", "the touch controls need several taps"),
        ),
    ),
    Kind(
        "lighting", "a string of outdoor lights", "lights", True,
        ("Firefly Yard 20", "Porchlight Row", "Twinkle Fence"),
        (
            F("20 warm-white bulbs", "the warm white is soft and pretty",
              "two of the bulbs were dead in the box"),
            F("a solar panel", "the solar panel keeps them going all evening",
              "the solar panel only gives an hour or so"),
            F("eight light modes", "the slow fade mode is lovely", "the mode resets every night"),
            F("weatherproof sockets", "the sockets have handled heavy rain",
              "the sockets let in a bit of water"),
        ),
    ),
    Kind(
        "lighting", "a rechargeable camping lantern", "lantern", False,
        ("Tentglow 2", "Campwick"),
        (
            F("three light settings", "the low setting is just right inside a tent",
              "the low setting is still too bright for a tent"),
            F("a folding hook", "the folding hook hangs from any branch",
              "the folding hook does not lock open"),
            F("a water-resistant body", "it sat through a wet night without trouble",
              "a little damp got inside on a wet night"),
            F("a battery level light", "the battery light is easy to understand",
              "the battery light is always green"),
        ),
        heldout_only=True,
    ),
    Kind(
        "stationery", "a hardcover notebook", "notebook", False,
        ("Quillmore A5", "Plainleaf", "Marginalia Dot"),
        (
            F("thick dotted pages", "the pages take ink without bleeding", "the pages let ink bleed through"),
            F("an elastic closure", "the elastic is still tight", "the elastic went slack"),
            F("two ribbon markers", "the two ribbons are really handy", "the ribbons started to unravel"),
            F("a back pocket", "the back pocket holds my receipts", "the back pocket tore at the edge"),
        ),
    ),
    Kind(
        "stationery", "a pack of twelve gel pens", "pens", True,
        ("Inkling Twelve", "Scribbly Set", "Smoothline 12"),
        (
            F("quick-dry ink", "the ink dries before I can smudge it", "the ink smudges under my hand"),
            F("fine 0.5 mm tips", "the fine tips write smoothly", "the fine tips skip on normal paper"),
            F("soft rubber grips", "the grips are comfy for long notes", "the grips slide down"),
            F("a zip-up pouch", "the pouch keeps them all in one place", "the pouch zip broke"),
        ),
    ),
    Kind(
        "stationery", "a mesh desk organizer", "organizer", False,
        ("Tidyhutch", "Deskmate Grid", "Paperclip Hall"),
        (
            F("five compartments", "the compartments are a sensible size",
              "the compartments are too narrow for my pens"),
            F("a sliding drawer", "the drawer slides smoothly", "the drawer falls out if I pull too far"),
            F("rubber feet", "the rubber feet keep it from sliding", "the rubber feet came unstuck"),
            F("an upright file holder", "the file holder takes a whole stack of folders",
              "the file holder bends under a few folders"),
        ),
    ),
)
# fmt: on

TIMES: dict[str, tuple[str, ...]] = {
    "positive": ("three weeks", "a month", "six weeks", "two months", "three months"),
    "neutral": ("two weeks", "three weeks", "a month", "five weeks"),
    "negative": ("four days", "a week", "ten days", "two weeks"),
}

# Slots: {noun}, {t} for a length of time, and the words of agreement().
OPENINGS: dict[str, tuple[str, ...]] = {
    "positive": (
        "Had {this} {noun} for {t} now and I am really happy with {it}.",
        "Bought {this} {noun} {t} ago and I have no real complaints.",
        "About {t} in and I am very pleased with {this} {noun}.",
        "Been using {this} {noun} for {t} and {they_are} better than I expected.",
    ),
    "neutral": (
        "Had {this} {noun} for {t} now and {they_are} okay, nothing special.",
        "Bought {this} {noun} {t} ago and I am kinda on the fence.",
        "About {t} in and {this} {noun} {does} the job, mostly.",
        "3 stars because after {t} {this} {noun} {is} just okay.",
    ),
    "negative": (
        "Had {this} {noun} for {t} and I am really disappointed.",
        "Bought {this} {noun} {t} ago and I already regret it.",
        "Only {t} in and I am fed up with {this} {noun}.",
        "1 star because after {t} {this} {noun} {is} already a letdown.",
    ),
}

# {a} and {b} are clauses about two different features: good and good, good and bad, bad and bad.
MIDDLES: dict[str, tuple[str, ...]] = {
    "positive": (
        "{A} and {b}.",
        "Honestly, {a}, and {b}.",
        "I like that {a}, and {b} too.",
        "The best part is that {a}.",
    ),
    "neutral": (
        "{A}, but {b}.",
        "Honestly, {a}, but {b}.",
        "I like that {a}, but {b}.",
        "{A}. On the other hand, {b}.",
    ),
    "negative": (
        "{A} and {b}.",
        "Honestly, {a}, and {b}.",
        "The main problem is that {a}, and {b}.",
        "{A}. On top of that, {b}.",
    ),
}

ASIDES: dict[str, tuple[str, ...]] = {
    "positive": (
        "My husband was skeptical at first but even he likes {it} now.",
        "My sister has already asked me where I got {it}.",
        "Delivery took two days and the packaging was simple.",
        "The box was a bit dented but everything inside was fine.",
        "Not the cheapest, but worth the extra few dollars.",
    ),
    "neutral": (
        "My husband likes {it} more than I do.",
        "My sister paid less for something very similar.",
        "Delivery took a week, which was okay.",
        "The price was fair, so I can live with that.",
        "The photos made {it} look a little nicer.",
    ),
    "negative": (
        "My husband told me not to bother and he was right.",
        "My sister paid half as much and hers {is} better.",
        "Delivery was late too, and the box was crushed.",
        "For this price I expected a lot more.",
        "I wrote to the seller twice and got no answer.",
    ),
}

CATEGORY_ASIDES: dict[str, dict[str, tuple[str, ...]]] = {
    "kitchen": {
        "positive": (
            "We have a tiny kitchen and it fits right in.",
            "It gets used every single day in our house.",
        ),
        "neutral": ("It takes up a bit more counter space than I thought.",),
        "negative": ("I have gone back to our old one from the cupboard.",),
    },
    "audio": {
        "positive": ("I mostly listen while doing the dishes and the sound is clear.",),
        "neutral": ("The sound is decent for podcasts, a little thin for music.",),
        "negative": ("The sound keeps cutting out when I walk to the next room.",),
    },
    "luggage": {
        "positive": ("Took {it} on a long weekend with the kids and had room to spare.",),
        "neutral": ("Took {it} on one trip and {it} came back a bit scuffed.",),
        "negative": ("We noticed on the first morning of our vacation, of course.",),
    },
    "shoes": {
        "positive": ("I normally wear a half size and these fit fine.",),
        "neutral": ("They run a little small, so I had to size up.",),
        "negative": ("They run very small and my toes hurt by evening.",),
    },
    "bedding": {
        "positive": ("My husband usually tosses and turns, and even he sleeps well now.",),
        "neutral": ("There was a slight smell at first but it faded.",),
        "negative": ("There was a chemical smell that never went away.",),
    },
    "garden": {
        "positive": (
            "Our yard is small and this is all we need.",
            "My neighbor has already borrowed {it} twice.",
        ),
        "neutral": ("Okay for our small yard, not for a big one.",),
        "negative": ("My old {one} from the shed does a better job.",),
    },
    "pets": {
        "positive": ("Our old boy took to it on the first day.",),
        "neutral": ("It took our picky one a while to go near it.",),
        "negative": ("Our picky one tried it twice and gave up.",),
    },
    "toys": {
        "positive": ("My four-year-old plays with {it} every day after preschool.",),
        "neutral": ("My son played with {it} a lot at first, less so now.",),
        "negative": ("My daughter was in tears on her birthday.",),
    },
    "phone": {
        "positive": ("I drop things a lot and it is holding up.", "Got a second one for my son."),
        "neutral": ("It is a bit bulkier than it looks in the photos.",),
        "negative": ("It feels much cheaper than it looks in the photos.",),
    },
    "fitness": {
        "positive": ("I work out in the living room before the kids wake up.",),
        "neutral": ("Good enough for a short workout in the living room.",),
        "negative": ("I went back to my old {one} for my morning workouts.",),
    },
    "lighting": {
        "positive": ("Setting {it} up took me about five minutes.",),
        "neutral": ("Setting {it} up took longer than I thought.",),
        "negative": ("{It} flickered from the very first evening.",),
    },
    "stationery": {
        "positive": ("I use {it} at work every day and my desk mate is jealous.",),
        "neutral": ("Fine for home, maybe not for the office.",),
        "negative": ("I needed {it} for work and had to buy something else.",),
    },
}

VERDICTS: dict[str, tuple[str, ...]] = {
    "positive": (
        "Would definitely buy again.",
        "Very happy and would buy {it} again.",
        "Five stars from me, would buy again.",
        "Good value and I would buy {it} again.",
    ),
    "neutral": (
        "{It} {does} the job, so I am keeping {it}.",
        "Fine for the money, just do not expect too much.",
        "Not bad, not great, so three stars.",
        "Not sure I would buy again, but {they_are} fine.",
    ),
    "negative": (
        "Sent {it} back for a refund.",
        "Returning {it} this week and would not buy again.",
        "I returned {it} and got my money back.",
        "Would not recommend, {they_are} going back.",
    ),
}

# A review may match each of these at most once, so that its stock parts do not echo one another.
AT_MOST_ONCE = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\bhonestly\b",
        r"\b(?:does|do) the job\b",
        r"\bfine\b",
        r"\bokay\b",
        r"\bstars?\b",
        r"\bhappy\b",
        r"\bprice\b|\bmoney\b|\bvalue\b|\bdollars\b",
        r"\bagain\b",
        r"\breally\b",
        r"\bvery\b",
        r"\balready\b",
        r"\bmy (?:husband|sister|son|daughter)\b",
        r"\bsmells?\b",
        r"\bevery day\b|\bevery single day\b|\bdaily\b",
        r"\bthe box\b|\bin the box\b|\bpackaging\b",
        r"\bat first\b|\bfrom the start\b",
        r"\bhandy\b",
        r"\ba bit\b",
        r"\beasy\b|\beasily\b",
        r"\bhold(?:s|ing)? up\b|\bheld up\b",
        r"\bbetter\b",
        r"\btoo much\b|\btoo\b",
        r"\bplenty\b",
        r"\bso\b",
        r"\bmostly\b|\bmost of\b",
        r"\bsimple\b",
        r"\blikes?\b",
    )
)


def agreement(kind: Kind) -> dict[str, str]:
    """Words that must agree in number with what a customer calls the product."""
    if kind.plural:
        words = {
            "this": "these",
            "it": "them",
            "It": "They",
            "is": "are",
            "does": "do",
            "one": "pair",
            "they_are": "they are",
        }
    else:
        words = {
            "this": "this",
            "it": "it",
            "It": "It",
            "is": "is",
            "does": "does",
            "one": "one",
            "they_are": "it is",
        }
    return words | {"noun": kind.noun}


def capitalized(text: str) -> str:
    """`text` with its first letter in upper case and the rest left alone."""
    return text[:1].upper() + text[1:]


def describe(rng: random.Random, name: str, kind: Kind, features: tuple[Feature, ...]) -> str:
    """A shop's one- or two-sentence description of a product."""
    first, second, third = (feature.listing for feature in features)
    also = "They also have" if kind.plural else "It also has"
    form = rng.randrange(3)
    if form == 0:
        return f"{name} - {kind.phrase} with {first}, {second} and {third}."
    if form == 1:
        return f"{name} - {kind.phrase} with {first} and {second}. {also} {third}."
    return f"{name}, {kind.phrase}. Features {first}, {second} and {third}."


def make_product(rng: random.Random, name: str, kind: Kind) -> Product:
    """A product of this kind with three of the kind's features, in a random order."""
    features = tuple(rng.sample(kind.features, 3))
    return Product(name, kind, features, describe(rng, name, kind, features))


def split_products(rng: random.Random) -> tuple[list[Product], list[Product]]:
    """The products to train on and those held out: one per category, and all of the held-out kinds."""
    shared = [kind for kind in KINDS if not kind.heldout_only]
    heldout_names: set[str] = set()
    for category in dict.fromkeys(kind.category for kind in shared):
        kind = rng.choice([kind for kind in shared if kind.category == category])
        heldout_names.add(rng.choice(kind.names))
    train: list[Product] = []
    heldout: list[Product] = []
    for kind in KINDS:
        for name in kind.names:
            product = make_product(rng, name, kind)
            (heldout if kind.heldout_only or name in heldout_names else train).append(product)
    return train, heldout


def draft_review(rng: random.Random, product: Product, mood: str) -> str:
    """One try at a review; the caller checks it."""
    kind = product.kind
    words = agreement(kind)
    first, second = rng.sample(product.features, 2)
    a = first.bad if mood == "negative" else first.good
    b = second.good if mood == "positive" else second.bad
    # Half of the reviews take an aside that fits the category, the rest one that fits anything.
    own_aside = rng.random() < 0.5
    aside = rng.choice(CATEGORY_ASIDES[kind.category][mood] if own_aside else ASIDES[mood])
    middle = rng.choice(MIDDLES[mood]).format(a=a, b=b, A=capitalized(a))
    opening = rng.choice(OPENINGS[mood]).format(t=rng.choice(TIMES[mood]), **words)
    verdict = rng.choice(VERDICTS[mood])
    return " ".join((opening, middle, aside.format(**words), verdict.format(**words)))


def reads_well(text: str) -> bool:
    """Whether a draft has the right length and does not repeat itself."""
    if not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
        return False
    return all(len(pattern.findall(text)) <= 1 for pattern in AT_MOST_ONCE)


def reviews(rng: random.Random, product: Product, mood: str, count: int, seen: set[str]) -> Iterator[str]:
    """`count` reviews of a product in one mood, none of them in `seen`, with different openings."""
    openings: set[str] = set()
    for _ in range(MAX_TRIES):
        if len(openings) == count:
            return
        text = draft_review(rng, product, mood)
        opening = text[:12]
        if text in seen or opening in openings or not reads_well(text):
            continue
        seen.add(text)
        openings.add(opening)
        yield text
    if len(openings) < count:
        raise RuntimeError(f"could not write {count} {mood} reviews of {product.name}")


def make_rows(rng: random.Random, products: list[Product], variants: int, seen: set[str]) -> list[Row]:
    """The rows for these products in all moods, shuffled."""
    rows = [
        {
            "instruction": f"Write a {mood} review for the following product.",
            "input": product.description,
            "output": text,
        }
        for product in products
        for mood in MOODS
        for text in reviews(rng, product, mood, variants, seen)
    ]
    rng.shuffle(rows)
    return rows


def check(train: list[Row], heldout: list[Row]) -> None:
    """Raise if the two sets break a promise made in their README."""
    names = [name for kind in KINDS for name in kind.names]
    outputs = [row["output"] for row in train + heldout]
    if len(set(names)) != len(names) or len(set(outputs)) != len(outputs):
        raise ValueError("a product name or a review occurs twice")
    if {row["input"] for row in train} & {row["input"] for row in heldout}:
        raise ValueError("a product is in both files")
    for rows in (train, heldout):
        if len({sum(mood in row["instruction"] for row in rows) for mood in MOODS}) != 1:
            raise ValueError("the moods are not equally frequent")
    if not all(text.isascii() for row in train + heldout for text in row.values()):
        raise ValueError("a row is not ASCII")


README = """\
# The quickstart's folder

`quickstart.yaml` is the run's config, with its base beside it; `jlora train quickstart.yaml` trains it on these rows.

## Synthetic product reviews

`train.jsonl` has {train} rows and `heldout.jsonl` has {heldout}. Each row is a JSON object with
`instruction` (one of three: write a positive, a neutral or a negative review; in equal numbers), `input` (a
product description) and `output` (the review, {low} to {high} words, {mean:.0f} on average).

**The rows are synthetic.** The products are invented, and the reviews are not real customers' words: both are
put together by `scripts/make_reviews.py` from templates and word lists written by the project's authors. They
are released under the project's Apache-2.0 licence.

- `train.jsonl`: {train_products} products, {train_variants} reviews in each mood.
- `heldout.jsonl`: {heldout_products} products, {heldout_variants} review in each mood. None of these products
  is in `train.jsonl`. {shared_products} of them are of a kind that is (another toaster, say), so remarks
  about a feature can recur; the other {new_products} are of {new_kinds} kinds that occur only here.
- `prompts.jsonl`: instruction and input of {prompt_products} held-out products, which the quickstart shows.

Because the reviews share their templates, a low loss on `heldout.jsonl` shows that a model has picked up this
style. It says little about how well the model writes reviews in general.

To make the files again, in a checkout of jlora (the same seed gives the same bytes):

    python scripts/make_reviews.py --seed {seed}
"""


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON lines."""
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode("ascii"))


def main() -> None:
    """Write both files and their README."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Write the synthetic product-review data set.")
    parser.add_argument("--seed", type=int, default=7, help="seed of the random choices (default: 7)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write to")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    train_products, heldout_products = split_products(rng)
    seen: set[str] = set()
    train = make_rows(rng, train_products, TRAIN_VARIANTS, seen)
    heldout = make_rows(rng, heldout_products, HELDOUT_VARIANTS, seen)
    check(train, heldout)

    lengths = [len(row["output"].split()) for row in train + heldout]
    mean_words = sum(lengths) / len(lengths)
    new_products = sum(product.kind.heldout_only for product in heldout_products)
    readme = README.format(
        train=len(train),
        heldout=len(heldout),
        low=min(lengths),
        high=max(lengths),
        mean=mean_words,
        train_products=len(train_products),
        train_variants=TRAIN_VARIANTS,
        heldout_products=len(heldout_products),
        heldout_variants=HELDOUT_VARIANTS,
        shared_products=len(heldout_products) - new_products,
        new_products=new_products,
        new_kinds=sum(kind.heldout_only for kind in KINDS),
        prompt_products=PROMPT_PRODUCTS,
        seed=args.seed,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows(args.out / "train.jsonl", train)
    write_rows(args.out / "heldout.jsonl", heldout)
    shown = list(dict.fromkeys(row["input"] for row in heldout))[:PROMPT_PRODUCTS]
    asked = [row for description in shown for row in heldout if row["input"] == description]
    prompts = [{key: row[key] for key in ("instruction", "input")} for row in asked]
    write_rows(args.out / "prompts.jsonl", prompts)
    (args.out / "README.md").write_bytes(readme.encode("ascii"))
    print(f"{len(train)} + {len(heldout)} rows, {mean_words:.1f} words per review, in {args.out}")


if __name__ == "__main__":
    main()
