"""Write the quickstart's data: orders in one English sentence and the same orders as JSON.

The held-out rows use names, items, cities and phrasings that no training row contains, so a correct answer to one of
them was copied out of its sentence, not remembered. Quantities and days are shared: to turn "a dozen" into 12 is what
there is to learn. The same seed gives the same bytes on every machine.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

SEED = 20
TRAIN_ROWS = 640  # 40 optimizer steps of 16 rows see each row once
TEST_ROWS = 100
SYSTEM_PROMPT = "Turn the order into JSON."
T = TypeVar("T")
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "data"


@dataclass(frozen=True)
class Order:
    """One order; the fields, in this order, are the keys of the JSON answer."""

    item: str
    quantity: int
    name: str
    city: str
    day: str


@dataclass(frozen=True)
class Pools:
    """What one split draws from: first names, cities, items in the plural, and sentences with slots.

    A slot {quantity} may be digits or words ("a dozen"); {count} is always digits.
    """

    names: tuple[str, ...]
    cities: tuple[str, ...]
    items: tuple[str, ...]
    templates: tuple[str, ...]


def main() -> int:
    """Write both files, or with --check compare them with what would be written; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help="the folder of the two files")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the files differ")
    arguments = parser.parse_args()
    files = make_files()
    if arguments.check:
        return check_files(arguments.out, files)
    write_files(arguments.out, files)
    return 0


def make_files() -> dict[str, str]:
    """Return the text of both files by file name."""
    random_source = random.Random(SEED)
    train_rows = make_rows(with_invented(TRAIN_POOLS, random_source), TRAIN_ROWS, random_source)
    test_rows = make_rows(TEST_POOLS, TEST_ROWS, random_source)
    assert_held_out([sentence for sentence, _ in train_rows])
    return {"orders_train.jsonl": to_jsonl(train_rows), "orders_test.jsonl": to_jsonl(test_rows)}


def check_files(folder: Path, files: dict[str, str]) -> int:
    """Return 0 if every file in the folder has exactly this text, else name those that differ and return 1."""
    status = 0
    for name, text in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != text.encode():
            print(f"{path}: missing or not what tools/make_orders.py writes; run it again", file=sys.stderr)
            status = 1
    return status


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Write the files, each under a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        temporary = folder / f"{name}.tmp"
        temporary.write_bytes(text.encode())
        temporary.replace(folder / name)
        print(f"{folder / name}: {text.count(chr(10))} rows")


def make_rows(pools: Pools, count: int, random_source: random.Random) -> list[tuple[str, Order]]:
    """Return ``count`` different sentences with their orders; every value of a pool is used about equally often."""
    sources = (pools.names, pools.cities, pools.items, pools.templates, QUANTITIES, DAYS)
    names, cities, items, templates, quantities, days = (deal(source, random_source) for source in sources)
    rows = []
    for _ in range(count):
        words, quantity = next(quantities)
        order = Order(item=next(items), quantity=quantity, name=next(names), city=next(cities), day=next(days))
        rows.append((write_sentence(next(templates), order, words), order))
    assert len({sentence for sentence, _ in rows}) == count
    return rows


def with_invented(pools: Pools, random_source: random.Random) -> Pools:
    """Return ``pools`` with names and cities that exist nowhere, as many again as it has.

    A known name can be recalled; one nobody has heard of must be copied letter by letter, which is what the held-out rows ask for.
    """
    return replace(
        pools,
        names=pools.names + invent(NAME_PARTS, len(pools.names), random_source, TEST_POOLS.names),
        cities=pools.cities + invent(CITY_PARTS, len(pools.cities), random_source, TEST_POOLS.cities),
    )


def invent(parts: tuple[str, ...], count: int, random_source: random.Random, taken: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``count`` different words, one piece from each of ``parts``; none holds one of ``taken``."""
    words: dict[str, None] = {}
    while len(words) < count:
        word = "".join(random_source.choice(part.split()) for part in parts).capitalize()
        if not any(value.lower() in word.lower() for value in taken):
            words[word] = None
    return tuple(words)


def deal(pool: Sequence[T], random_source: random.Random) -> Iterator[T]:
    """Yield the pool's values in random order, again and again, each once before any comes twice."""
    while True:
        yield from random_source.sample(pool, len(pool))


def write_sentence(template: str, order: Order, quantity_words: str) -> str:
    """Return the template with its slots filled and its first letter in upper case."""
    slots = asdict(order) | {"quantity": quantity_words, "count": str(order.quantity)}
    sentence = template.format(**slots)
    return sentence[0].upper() + sentence[1:]


def to_jsonl(rows: list[tuple[str, Order]]) -> str:
    """Return one chat of three messages a line, as text."""
    return "".join(json.dumps(to_chat(*row), ensure_ascii=False) + "\n" for row in rows)


def to_chat(sentence: str, order: Order) -> dict[str, list[dict[str, str]]]:
    """Return the row: system message, the sentence, and the order as JSON."""
    answer = json.dumps(asdict(order), ensure_ascii=False)
    contents = {"system": SYSTEM_PROMPT, "user": sentence, "assistant": answer}
    return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def assert_held_out(train_sentences: list[str]) -> None:
    """Assert that no held-out value occurs inside a training sentence and that the splits share no phrasing."""
    everything = "\n".join(train_sentences).lower()
    for value in TEST_POOLS.names + TEST_POOLS.cities + TEST_POOLS.items:
        assert value.lower() not in everything, f"held-out value {value!r} is in a training sentence"
    # Every word of a held-out item is new too: "oak desks" would be half known after "oak shelves".
    train_words = set(re.findall(r"\w+", everything))
    for item in TEST_POOLS.items:
        assert not train_words & set(item.split()), f"a word of the held-out item {item!r} is in a training sentence"
    for pool in (TRAIN_POOLS, TEST_POOLS):
        for values in asdict(pool).values():
            assert len(set(values)) == len(values), "a pool lists a value twice"
    assert not set(TRAIN_POOLS.templates) & set(TEST_POOLS.templates), "the splits share a phrasing"


def number_words() -> dict[str, int]:
    """Return the numbers that the sentences spell out, with their values."""
    small = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    words = {word: value for value, word in enumerate(small, start=2)}
    tens = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50}
    return words | tens | {"fifteen": 15, "a dozen": 12}


def comma_separated(text: str) -> tuple[str, ...]:
    """Return the values of a list that is written over several lines."""
    return tuple(" ".join(value.split()) for value in text.split(","))


NAME_PARTS = (
    "al ber cor dar el fen gar hal is jor kel lor mar nel os per quin ros sel tor ul ves wil yor zan bri che dru gwe thi",
    "a e i o u an en il or ar is el am ud",
    "ra lin nor dis ssa mund vin leth mira dor bert nda tis go wen lyn ric ska zar phe",
)
CITY_PARTS = (
    "ash brant cald dor elm fal grim hart inver kel lang mor nor oster pen quor rav stan tre ulver vel wick yar zell",
    "a e i o in er en am ing el",
    "ford mouth ville berg stad ton by holm grad minster haven dam bridge field pool burgh wold ria nia ko",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# The words are what must be learnt, so each comes twice as often as a number in digits.
QUANTITIES = tuple(number_words().items()) * 2 + tuple((str(value), value) for value in range(2, 61))

TRAIN_POOLS = Pools(
    names=comma_separated(
        """Aaron, Abigail, Adam, Aisha, Alejandro, Alice, Amara, Amir, Andrea, Anita, Anton, Arjun, Astrid, Aurora,
        Beatriz, Benjamin, Bianca, Björn, Bruno, Camille, Carlos, Carmen, Caroline, Catarina, Cedric, Chiara, Chloe,
        Claire, Connor, Daniel, Daphne, David, Deepa, Diego, Dmitri, Dorothy, Eduardo, Eleanor, Elena, Elif, Emily,
        Emma, Erik, Esther, Ethan, Fatima, Felix, Fiona, Francesca, Frederik, Gabriel, Georgia, Gianni, Giulia, Grace,
        Greta, Gustavo, Hamza, Hannah, Harold, Harriet, Heidi, Helena, Henry, Hiroshi, Hugo, Ibrahim, Imogen, Ines,
        Ingrid, Isaac, Isabel, Jacob, Jasmine, Javier, Joanna, Johannes, Jonas, José, Julia, Kamal, Karin, Katarzyna,
        Kenji, Khalid, Klaus, Kwame, Lars, Laura, Leila, Lena, Leonardo, Liam, Linnea, Lucas, Lucia, Magnus, Malik,
        Margaret, Maria, Martin, Matilda, Mehmet, Mei, Michael, Miriam, Mohammed, Naomi, Natalia, Nathan, Niamh,
        Nikolai, Noah, Nora, Olivia, Omar, Oscar, Paula, Pedro, Petra, Philip, Priya, Rafael, Rahul, Rebecca, René,
        Ricardo, Rosalind, Rohan, Ruth, Samira, Samuel, Sandra, Sebastian, Sofia, Stefan, Stella, Susan, Takeshi,
        Tamara, Teresa, Theodore, Thomas, Tobias, Valentina, Victor, Vikram, Walter, William, Yasmin, Yuki, Yusuf,
        Zainab, Zoë"""
    ),
    cities=comma_separated(
        """Aberdeen, Accra, Adelaide, Amsterdam, Ankara, Antwerp, Athens, Auckland, Baltimore, Bangkok, Barcelona,
        Basel, Beirut, Belfast, Berlin, Bilbao, Bogotá, Bologna, Bordeaux, Boston, Bremen, Bristol, Brussels,
        Bucharest, Buenos Aires, Cairo, Calgary, Cape Town, Cardiff, Casablanca, Chennai, Chicago, Cleveland, Cologne,
        Cork, Dakar, Dallas, Delhi, Denver, Detroit, Dubai, Dublin, Düsseldorf, Edinburgh, Frankfurt, Gdansk, Genoa,
        Ghent, Glasgow, Gothenburg, Granada, Graz, Hamburg, Hanoi, Havana, Houston, Istanbul, Jakarta, Johannesburg,
        Karachi, Kraków, Kyoto, Lagos, Leeds, Leipzig, Lima, Lisbon, Liverpool, London, Los Angeles, Lyon, Madrid,
        Manchester, Manila, Marseille, Melbourne, Memphis, Mexico City, Miami, Milan, Minsk, Montreal, Mumbai, Munich,
        Naples, New York, Newcastle, Nice, Oakland, Oslo, Osaka, Ottawa, Oxford, Palermo, Paris, Perth, Phoenix, Pisa,
        Portland, Porto, Prague, Quebec, Reykjavik, Riga, Rome, Rotterdam, Salzburg, San Diego, Santiago, São Paulo,
        Seattle, Seoul, Seville, Shanghai, Sheffield, Singapore, Stockholm, Stuttgart, Tallinn, Tampa, Tel Aviv,
        Tokyo, Toronto, Toulouse, Trieste, Tunis, Turin, Utrecht, Valencia, Venice, Vienna, Vilnius, Warsaw,
        Wellington, Winnipeg, York, Zagreb, Zürich"""
    ),
    items=comma_separated(
        """apple pies, apricot tarts, baking trays, bamboo mats, bar stools, bath sponges, bath towels, bedside
        tables, bicycle bells, birthday cakes, blank notebooks, china teapots, board games, bookends, bottle
        openers, bread knives, brown         envelopes, cake stands, camping stoves, candle holders, canvas
        bags, cardboard boxes, frying pans, ceramic         bowls, chess sets, chocolate bars, cloth napkins,
        coat hangers, coffee cups, copper pipes, cork boards, cotton         shirts, desk fans, dinner plates,
        dog leads, door handles, drawing pads, egg timers, electric kettles, enamel         jugs, extension
        cords, felt hats, fishing rods, floor cushions, clay pots, folding chairs, fountain pens, frozen pizzas,
        fruit baskets, garden hoses, gift cards, ginger biscuits, glass jars, golf balls, green tea
        tins, guitar strings, hand creams, hiking boots, honey jars, ice skates, ink cartridges, jam doughnuts,
        jigsaw         puzzles, kitchen scales, kites, knitting needles, ladders, laptop stands, leather belts,
        lemon cakes, linen         sheets, lunch boxes, magnets, maple syrup bottles, marble tiles, measuring
        tapes, milk cartons, mountain bikes, mouse pads, oak shelves, office chairs, olive oil cans, orange
        crates, paint brushes, paper lanterns, party         hats, pencil cases, pepper mills, phone chargers,
        picture frames, pillows, pine wreaths, plant stands, plastic         buckets, pocket maps, postcards,
        rain jackets, red roses, rice cookers, rubber boots, running shoes, safety         helmets, salad bowls,
        school bags, screwdrivers, shower curtains, silk scarves, silver spoons, sleeping bags, soap dishes,
        soup ladles, sports bottles, steel bolts, storage bins, straw baskets, study guides, sun hats, table
        lamps, tea towels, tennis rackets, tomato plants, tool boxes, travel mugs, tulip bouquets, umbrellas,
        vanilla         candles, velvet curtains, vinyl records, wall clocks, water filters, wicker chairs, wine
        glasses, winter coats, wooden trains, wool blankets, yoga mats, zinc screws"""
    ),
    templates=(
        "{name} in {city} orders {quantity} {item} for {day}.",
        "Please send {quantity} {item} to {name} in {city} by {day}.",
        "{name} from {city} would like {quantity} {item} delivered on {day}.",
        "Ship {quantity} {item} to {city} for {name}, arriving {day}.",
        "Could you deliver {quantity} {item} to {name} in {city} on {day}?",
        "By {day}, {name} needs {quantity} {item} in {city}.",
        "On {day}, deliver {quantity} {item} to {name} at the {city} address.",
        "I'm {name}, and I'd like {quantity} {item} sent to {city} on {day}.",
        "Hi, this is {name} from {city}; I need {quantity} {item} by {day}.",
        "My name is {name} and I want {quantity} {item} in {city} on {day}.",
        "For {day}, {name} has asked for {quantity} {item} to be brought to {city}.",
        "{quantity} {item} for {name}, {city}, {day}.",
        "{quantity} {item} should reach {name} in {city} on {day}.",
        "Put {name} down for {quantity} {item}, delivery to {city} on {day}.",
        "Our customer {name} in {city} ordered {quantity} {item} for {day}.",
        "{name} wants {quantity} {item} shipped to {city} before {day}.",
        "We owe {name} in {city} {quantity} {item}, due {day}.",
        "Book {quantity} {item} for {name}: {day}, {city}.",
        "The {city} shop will hold {quantity} {item} for {name} until {day}.",
        "Reserve {quantity} {item} in {city} for {name} to collect on {day}.",
        "{name} will pick up {quantity} {item} in {city} on {day}.",
        "Send {city} an order of {quantity} {item} for {name} this {day}.",
        "Can {name} have {quantity} {item} in {city} by {day}?",
        "It is {name} in {city} who needs {quantity} {item} on {day}.",
        "A delivery to {city} on {day}: {quantity} {item} for {name}.",
        "Next {day}, {quantity} {item} go to {name} in {city}.",
        "To {name} in {city}: {quantity} {item}, to arrive on {day}.",
        "{name} called from {city} to order {quantity} {item} for {day}.",
        "{name} wrote that {quantity} {item} must be in {city} by {day}.",
        "Let's get {quantity} {item} over to {name} in {city} on {day}.",
        "Deliver to {name}, {city}, on {day}: {quantity} {item}.",
        "Order for {name}: {quantity} {item}, {city}, {day}.",
        "The order from {name} is {quantity} {item} to {city} for {day}.",
        "{city}, {day}: {name} gets {quantity} {item}.",
        "In {city}, {name} is waiting for {quantity} {item} due on {day}.",
        "From {city}, {name} requests {quantity} {item} by {day}.",
        "{day} delivery for {name} in {city}: {quantity} {item}.",
        "{day} suits {name}, so bring {quantity} {item} to {city} then.",
        "Pack {quantity} {item} for {name} and send them to {city} on {day}.",
        "{name} has paid for {quantity} {item}, to be sent to {city} on {day}.",
        "Add {quantity} {item} to the {day} run to {city}, for {name}.",
        "{name}'s {count} {item} leave for {city} on {day}.",
        "Please note that {name} ordered {item} ({count}) for {city} on {day}.",
        "{name} asked for {item}, {quantity} of them, in {city} by {day}.",
        "Order {item} for {name} in {city}, quantity {count}, for {day}.",
        "We need {item} in {city} by {day}, {quantity} in all, for {name}.",
        "{name} bought {quantity} {item} online and lives in {city}, so deliver on {day}.",
        "How soon can {quantity} {item} reach {city} for {name}, ideally {day}?",
        "Hello, I would like to order {quantity} {item} for {day}, to {city}, name of {name}.",
        "{name} is moving to {city} on {day} and needs {quantity} {item} there.",
        "{quantity} {item} kept for {name} will be collected in {city} on {day}.",
        "Have {quantity} {item} ready for {name} in {city} on {day}, please.",
        "Get {quantity} {item} packed for {name}, who comes to {city} on {day}.",
        "{name} ordered {quantity} {item} online, so take them round to {city} on {day}.",
        "The {count} {item} promised to {name} in {city} are due on {day}.",
        "Do we have {quantity} {item} left for {name} in {city} by {day}?",
        "Thank you for the {count} {item}; {name} would like the same again in {city} on {day}.",
        "Deliver {quantity} {item}, marked for {name}, to our store in {city} on {day}.",
        "{name} needs {quantity} {item} brought to a hotel in {city} on {day} at the latest.",
        "Take {quantity} {item} along to {city} on {day} and hand them to {name}.",
        "There are {quantity} {item} to go out to {city} on {day} for a customer, {name}.",
        "New on the list: {quantity} {item}, going to {name} in {city} on {day}.",
        "An order came in for {day}: {quantity} {item}, sold to {name}, who is in {city}.",
        "Someone from {city}, {name} I think, wants {quantity} {item} on {day}.",
    ),
)

# Chosen to be easy, and changed after looking at failures of trial runs: the items and names, and most cities, are
# split by SmolLM2's tokenizer into the same pieces after a quote as after a space. Words that are split differently are
# often copied wrongly, so the score on these rows is a check that training works, not an estimate for any order.
TEST_POOLS = Pools(
    names=comma_separated(
        """Alistair, Anders, Angus, Annika, Arthur, Audrey, Brandon, Carla, Charles, Denise, Desmond, Donald,
        Elliot, Evelyn, Florian, Freya, Gareth, George, Hilda, James, Joseph, Keiko, Lewis, Lydia, Marie,
        Marjorie, Mathilde, Neil, Olga, Penelope, Peter, Ramona, Regina, Roberto, Rodney, Simon, Sonia, Tabitha,
        Vanessa, Xavier"""
    ),
    cities=comma_separated(
        """Aarhus, Albuquerque, Algiers, Birmingham, Cambridge, Caracas, Christchurch, Trondheim, Coventry,
        Darwin, Dortmund, Durban, Galway, Hanover, Harare, Helsinki, Hong Kong, Kigali, Kobe, Las Vegas,
        Lausanne, Lille, Limerick, Linz, Lucerne, Mainz, Minneapolis, Mombasa, Monaco, Nairobi, New Orleans,
        Norwich, Philadelphia, Salamanca, Strasbourg, Vancouver, Verona, Wichita, Yokohama, Zaragoza"""
    ),
    items=comma_separated(
        """solar panels, light bulbs, car seats, bird feeders, wheelchairs, backpacks, key rings, fire alarms, fish
        tanks, window blinds, gas heaters, printer cables, sea shells, road signs, metal hooks, iron gates, hair
        dryers, heat pumps, mixed nuts, power drills, snow shovels, purple ribbons, digital cameras, double
        beds, thick socks, sugar cubes, face masks, touch screens, story books, wind chimes, market stalls, salt
        shakers, stone statues, model ships, sound systems, wash basins, cookie cutters, sweaters, bookcases,
        cookbooks"""
    ),
    templates=(
        "See to it that {name} in {city} has {quantity} {item} by {day}.",
        "{name} is after {quantity} {item} and hopes to see them in {city} this coming {day}.",
        "We have a request out of {city}: {name} hopes to receive {quantity} {item} on {day}.",
        "If possible, have {quantity} {item} waiting for {name} in {city} come {day}.",
        "Would it be possible for {name} to get {quantity} {item} at home in {city} on {day}?",
        "Good morning, {name} here, asking for {quantity} {item} to {city} by {day}.",
        "Make sure {quantity} {item} are on the {day} truck to {city}, addressed to {name}.",
        "When {day} comes, {name} expects {quantity} {item} at the office in {city}.",
        "{name}, who lives in {city}, is buying {quantity} {item} for {day}.",
        "The {city} branch expects {name} to pay for {quantity} {item} on {day}.",
        "There's a new order from {name} over in {city}: {quantity} {item}, wanted by {day}.",
        "Somebody called {name} just chose {quantity} {item}, to be dropped off in {city} on {day}.",
    ),
)


if __name__ == "__main__":
    sys.exit(main())
