"""Write the prompts of `configs/smollm2.yaml`: short everyday instructions, from lists.

    python scripts/make_smollm2_prompts.py

They were written for this project, under its licence, to be answered in a sentence or a few. All
are different; one shuffle with a fixed seed cuts them into four disjoint files.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SPLITS = {"sft": 256, "opd": 256, "eval": 128, "dev": 64}

TEMPLATES: dict[str, str] = {
    "Explain briefly what {} is.": """
        photosynthesis; gravity; a volcano; inflation in economics; the water cycle; an
        ecosystem; electricity; a black hole; evaporation; a prime number; the greenhouse
        effect; a vaccine; an algorithm; magnetism; a metaphor; democracy; a food chain; the
        immune system; erosion; friction; a solar eclipse; a glacier; supply and demand; a
        computer network; biodiversity; compound interest; an earthquake; a coral reef; the
        ozone layer; a microscope; a lighthouse; a symphony; a haiku; a budget; a database; a
        telescope; a fossil; the Moon's orbit; a constitution; a trade union; renewable energy;
        a rainforest; an atom; a battery; a sonnet; insulation; a compass; a census; a
        satellite; a hurricane""",
    "What is the capital of {}?": """
        France; Japan; Italy; Spain; Egypt; Canada; Australia; Brazil; Kenya; Norway; Sweden;
        Greece; Portugal; India; China; Mexico; Peru; Chile; Turkey; Poland; Austria; Ireland;
        Finland; Denmark; Hungary; Thailand; Vietnam; Cuba; Germany; Russia; Argentina; South
        Korea; Morocco; Belgium; the Netherlands; Indonesia""",
    "Why {}?": """
        is the sky blue; do leaves change colour in autumn; do we need sleep; is the sea salty;
        do birds migrate; does ice float on water; do cats purr; is exercise good for the heart;
        do we have seasons; does bread rise; do bees make honey; is it important to drink water;
        do people keep pets; do onions make us cry; does metal feel cold; do stars twinkle; is
        reading good for children; do some animals hibernate; does popcorn pop; do we yawn; are
        trees important for cities; is recycling useful; does the Moon change its shape; do we
        brush our teeth; is honesty important in friendship; do plants need sunlight; do people
        learn foreign languages; do dogs wag their tails; does iron rust; is it useful to keep a
        diary; do boats float; do we celebrate birthdays; does soap clean; do mountains have
        snow on top; are maps useful; do tyres have tread; is glass transparent""",
    "Give three short tips for {}.": """
        sleeping better; saving money; learning a new language; writing a good email; staying
        focused at work; packing a suitcase; growing tomatoes; making new friends; preparing for
        an exam; eating more vegetables; reducing stress; cooking rice; taking better photos;
        starting to run; keeping a house tidy; speaking in public; remembering names; training a
        puppy; waking up early; reading more books; riding a bicycle safely; planning a holiday;
        working from home; saving water; caring for houseplants; a job interview; baking bread;
        hiking in the mountains; using less plastic; organising a small party; learning to draw;
        listening to others""",
    "What is the difference between {}?": """
        a lake and a river; weather and climate; a fruit and a vegetable; a planet and a star; a
        frog and a toad; butter and margarine; a city and a village; mass and weight; speed and
        velocity; an alligator and a crocodile; a novel and a short story; a comet and an
        asteroid; tea and coffee; a violin and a cello; jam and honey; a simile and a metaphor;
        fog and smoke; a bank and a shop; wood and metal; a hill and a mountain; a debit card
        and a credit card; a square and a rectangle; a moth and a butterfly; a teacher and a
        coach; a law and a rule; a ship and a boat; a poem and a song; hardware and software; an
        island and a continent; sleet and hail""",
    "Describe {} in two sentences.": """
        a quiet beach at sunrise; a busy market; an old library; a snowy morning; a
        thunderstorm; a small cottage in the woods; a crowded train; a summer garden; a city at
        night; a mountain lake; a kitchen where bread is baking; a desert; an autumn park; a
        fishing village; a school playground; a rainy street; a waterfall; a harbour; a candle
        in a dark room; a football match; a farm in spring; a museum; an elephant; a bakery; a
        foggy bridge; a camp fire; an airport; a sleeping cat; a vineyard; a concert""",
    "List five {}.": """
        kinds of fruit; wild animals; musical instruments; colours; sports; vegetables;
        countries in Europe; things found in a kitchen; kinds of trees; ways to relax; school
        subjects; means of transport; birds; flowers; kinds of weather; jobs in a hospital;
        healthy breakfasts; things to take to the beach; tools used by a carpenter; feelings;
        kinds of fish; farm animals; items of clothing; board games; drinks; rivers of the
        world; insects; reasons to visit a library; kinds of cheese; things you can recycle""",
    "Rewrite this sentence more politely: {}": """
        Give me the report now.; You are wrong about this.; Move your car.; I do not want to
        come.; Stop talking.; Send me the files.; This food is bad.; Wait outside.; You forgot
        my order.; Close the window.; I need help.; Tell me your name.; Your music is too loud.;
        Fix this mistake.; Answer my question.; Do not touch that.; You are late again.; Read
        the instructions.; Bring me a glass of water.; Leave me alone.; Turn off the light.; I
        cannot read your writing.; Hurry up.; That idea makes no sense.""",
    'Write one sentence that uses the word "{}".': """
        bridge; curious; lantern; gentle; harvest; journey; puzzle; silver; thunder; whisper;
        ancient; balance; courage; distant; envelope; feather; generous; horizon; island;
        kettle; ladder; meadow; orchard; patient; quiet; ribbon; shelter; tunnel; umbrella;
        village; window; compass; blanket; marble; rescue; surprise""",
    "Change this sentence to the past tense: {}": """
        She walks to school.; They play chess every evening.; I write a letter to my aunt.; He
        drinks a cup of tea.; We go to the market.; The dog barks.; You sing very well.; The
        children build a tower.; My brother buys a new bicycle.; It rains.; The teacher explains
        the lesson.; I forget my keys.; The train leaves at noon.; We swim in the lake.; She
        teaches music.; He runs fast.; The sun rises.; They eat breakfast.; The baker sells
        bread.; I see a rainbow.; The river flows to the sea.; You find a coin.; The bird flies
        away.; We know the answer.""",
    "Write a short poem of four lines about {}.": """
        the sea; winter; a friend; the moon; spring rain; a train journey; a garden; the wind; a
        mother; hope; a small bird; the night sky; coffee; an old tree; time; a river; home;
        music; snow; the colour blue; a cat; morning; the desert; a book; kindness; a
        lighthouse; the forest; summer""",
    "Suggest a title for a story about {}.": """
        a lost dog that finds its way home; a girl who talks to trees; a clock that runs
        backwards; two friends who open a bakery; a robot that learns to paint; a village
        without a name; a sailor and a whale; a boy who collects sounds; a key that opens every
        door; a teacher on the Moon; a letter that arrives too late; a garden on a roof; a
        musician who forgets a song; a dragon afraid of fire; a map without roads; twins who
        swap places; a baker who wins a race; a snowman in summer; a library under the sea; an
        inventor and her grandfather; a cat that travels by train; a king who wants to be a
        gardener; a lighthouse keeper's secret; a city where nobody sleeps""",
    "How do you {}?": """
        make a cup of tea; boil an egg; plant a seed; tie a shoelace; write a thank-you note;
        clean a window; change a light bulb; make a paper aeroplane; measure the length of a
        room; borrow a book from a library; make a simple salad; wash your hands properly;
        introduce two people; mail a parcel; fold a shirt; make pancakes; look up a word in a
        dictionary; set an alarm; draw a circle; cut an apple; warm up before running; make
        lemonade; wrap a gift; peel an orange; read a thermometer; find north without a compass;
        make a sandwich; water a plant""",
    "Who was {}?": """
        Albert Einstein; Marie Curie; Leonardo da Vinci; William Shakespeare; Isaac Newton;
        Cleopatra; Mozart; Charles Darwin; Abraham Lincoln; Mahatma Gandhi; Nelson Mandela;
        Aristotle; Vincent van Gogh; Galileo Galilei; Florence Nightingale; Julius Caesar;
        Beethoven; Ada Lovelace; Alexander the Great; Martin Luther King Jr.; Jane Austen;
        Johannes Gutenberg; Amelia Earhart; Thomas Edison; Plato; Marco Polo; Louis Pasteur;
        Joan of Arc""",
    "What does {} do?": """
        a doctor; a firefighter; a plumber; a librarian; a pilot; a baker; a judge; a farmer; a
        nurse; a translator; a carpenter; a dentist; a journalist; a gardener; an electrician; a
        photographer; a chef; a mechanic; a pharmacist; a tailor; a programmer; an architect; a
        postal worker; a veterinarian; a musician; an accountant; a biologist; a lifeguard; a
        tour guide; a sculptor""",
    "Write a friendly message to {}.": """
        a neighbour who lent you a ladder; a friend on her birthday; a colleague who is ill; a
        new classmate; your grandmother; a teacher at the end of the year; a customer who has
        waited long; a friend who passed an exam; someone moving into your street; a team after
        a long project; a guest before a visit; your landlord about a broken lamp; a friend you
        have not seen for a year; a coach after a lost match; a pen friend in another country;
        parents inviting them to dinner; a shop asking when it opens; a friend who is moving
        away; a cousin who had a baby; a volunteer who helped you""",
    "What is a good use for {}?": """
        an old newspaper; an empty glass jar; a cardboard box; a spare hour; stale bread; a
        broken mug; old clothes; leftover rice; a wooden crate; coffee grounds; an old bicycle;
        a large shell; a piece of string; ripe bananas; an old towel; a whiteboard; a notebook;
        a small balcony; orange peel; fallen leaves; a pair of old socks; a spare room; a rainy
        afternoon; plastic bottles; a ladder""",
    "Finish this sentence in an interesting way: {}": """
        When the lights went out,; On the last day of summer,; The old man opened the box and;
        If I could fly,; At the top of the hill,; Nobody knew that the cat; After the storm,;
        The best thing about winter is; In the middle of the night,; She looked at the map and;
        Every morning, the baker; The letter said that; Under the bridge,; My favourite place
        is; The robot asked,; When I was young,; The train stopped and; Behind the curtain,; If
        animals could talk,; The smell of fresh bread; Once the snow had melted,; The key did
        not fit, so; Far away from the city,; On my way home,; The music stopped when""",
    "Name one advantage and one disadvantage of {}.": """
        living in a city; working at night; travelling by train; owning a car; having a large
        family; studying abroad; buying clothes online; eating in restaurants; watching
        television; using a smartphone; living alone; being tall; keeping a dog; reading
        electronic books; working in a team; a very hot summer; living near the sea; playing
        video games; getting up early; paying in cash; learning at home; flying; wearing a
        uniform; solar power; growing your own food""",
    'What is the opposite of the word "{}", and how is it used?': """
        early; brave; empty; noisy; polite; narrow; generous; fragile; ancient; victory;
        increase; careful; arrive; shallow; simple; rough; accept; cheap; dark; strong""",
    "Explain to a child {}.": """
        why we should share; how rain is made; what a shadow is; why we say thank you; what
        money is for; how a seed becomes a tree; what a doctor does; why the Sun is important;
        how fish breathe; what a map shows; why we must cross the street carefully; what a year
        is; how birds can fly; what a friend is; why we wash our hands; how an echo works; what
        a bridge is for; why we go to school; where milk comes from; what a dream is; how a boat
        moves; what the Earth is; why ice melts; what a wheel is for; how bees help flowers""",
    "Choose a name for {} and say why it fits.": """
        a grey kitten; a sailing boat; a small cafe; a hiking club; a friendly robot; a
        bookshop; a football team of beginners; a white horse; a bakery on a corner; a choir; a
        garden centre; a parrot; a science magazine; a toy shop; a mountain cabin; a racing
        bicycle; a cooking blog; a puppy; a flower shop; a chess club""",
    "Summarise in a few words: {}": """
        The meeting was moved from Monday to Wednesday because the manager was ill.; The museum
        opens at nine, closes at five and is free for children on Sundays.; After three days of
        rain the river rose and the road to the village was closed.; She tried four different
        keys before she noticed that the door had never been locked.; Our team lost the first
        two games but won all the others and finished second.; The shop no longer sells
        umbrellas because hardly anyone bought them last year.; He wanted to catch the early
        train, but his alarm did not ring and he arrived at noon.; The new park has a pond, many
        benches and a large playground for small children.; The cake needs flour, eggs, sugar
        and butter and is baked for forty minutes.; The library asks all readers to return their
        books before the holidays begin.; Because the bridge is being repaired, buses take a
        longer way until October.; The cat slept all day, hunted all night and looked surprised
        when nobody praised it.; Scientists found that the plants grew faster when music was
        played, but only in spring.; My grandfather sold his car, bought a bicycle and says that
        he has never felt younger.""",
    "What are {} made of?": """
        windows; shoes; pencils; candles; books; bricks; coins; clouds; rubber boots; guitars;
        pizzas; omelettes; snowflakes; bicycles; woollen jumpers; baskets; paper bags; chocolate
        bars; bird nests; diamonds; tennis balls; sandcastles; drums; tea bags; roads""",
    "Describe how {} feels or tastes.": """
        a ripe peach; cold water on a hot day; a wool scarf; a lemon; warm bread; fresh snow;
        honey; a sandy beach under bare feet; dark chocolate; a velvet cushion; mint tea; a pine
        cone; salted popcorn; silk; ginger; a smooth pebble; strawberries with cream; a warm
        bath; black pepper; a feather pillow""",
    "Write an invitation to {} in two sentences.": """
        a birthday picnic; a film evening; a book club; a house-warming party; a school play; a
        garden party; a morning run; a cooking class; a chess evening; a museum visit; a
        farewell lunch; a street festival; a boat trip; a piano recital; a quiz night; a
        tree-planting day; a family dinner; a football game; a craft fair; a stargazing night""",
    "Which season is best for {}, and why?": """
        planting roses; skiing; a beach holiday; picking apples; watching birds; camping; a long
        bicycle tour; visiting a big city; flying a kite; baking; painting a house; a wedding;
        fishing; photographing flowers; reading indoors""",
}


def all_prompts() -> list[str]:
    """Every template with every entry of its list."""
    return [
        template.format(" ".join(item.split()))
        for template, items in TEMPLATES.items()
        for item in items.split(";")
    ]


def write_prompts(folder: Path) -> None:
    """Shuffle once and cut into the four files."""
    prompts = all_prompts()
    random.Random(0).shuffle(prompts)
    for split, count in SPLITS.items():
        part, prompts = prompts[:count], prompts[count:]
        if len(part) < count:
            raise ValueError(f"{split}: {len(part)} prompts left, {count} needed; add to TEMPLATES")
        lines = [
            json.dumps({"id": f"{split}-{i:03d}", "prompt": prompt})
            for i, prompt in enumerate(part)
        ]
        (folder / f"prompts_{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def main() -> None:
    """Write four files into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shipped = Path(__file__).parents[1] / "configs" / "smollm2"
    parser.add_argument("--out", type=Path, default=shipped)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_prompts(args.out)


if __name__ == "__main__":
    main()
