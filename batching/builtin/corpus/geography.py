"""Capitals and continents of 118 countries: facts, so the held-out thing is the phrasing."""

from random import Random

from .exchange import Exchange

_BY_CONTINENT = {
    "Europe": (
        "Albania:Tirana|Austria:Vienna|Belgium:Brussels|Bulgaria:Sofia|Croatia:Zagreb|"
        "Cyprus:Nicosia|Czechia:Prague|Denmark:Copenhagen|Estonia:Tallinn|Finland:Helsinki|"
        "France:Paris|Germany:Berlin|Greece:Athens|Hungary:Budapest|Iceland:Reykjavík|"
        "Ireland:Dublin|Italy:Rome|Latvia:Riga|Lithuania:Vilnius|Luxembourg:Luxembourg City|"
        "Malta:Valletta|Moldova:Chișinău|Norway:Oslo|Poland:Warsaw|Portugal:Lisbon|"
        "Romania:Bucharest|Serbia:Belgrade|Slovakia:Bratislava|Slovenia:Ljubljana|Spain:Madrid|"
        "Sweden:Stockholm|Switzerland:Bern|Ukraine:Kyiv|the United Kingdom:London"
    ),
    "Asia": (
        "Armenia:Yerevan|Bangladesh:Dhaka|Bhutan:Thimphu|Cambodia:Phnom Penh|China:Beijing|"
        "Georgia:Tbilisi|India:New Delhi|Indonesia:Jakarta|Iran:Tehran|Iraq:Baghdad|"
        "Japan:Tokyo|Jordan:Amman|Kazakhstan:Astana|Kuwait:Kuwait City|Laos:Vientiane|"
        "Lebanon:Beirut|Malaysia:Kuala Lumpur|the Maldives:Malé|Mongolia:Ulaanbaatar|"
        "Nepal:Kathmandu|Oman:Muscat|Pakistan:Islamabad|the Philippines:Manila|Qatar:Doha|"
        "Saudi Arabia:Riyadh|Singapore:Singapore|South Korea:Seoul|Syria:Damascus|"
        "Thailand:Bangkok|Turkey:Ankara|Uzbekistan:Tashkent|Vietnam:Hanoi"
    ),
    "Africa": (
        "Algeria:Algiers|Angola:Luanda|Botswana:Gaborone|Cameroon:Yaoundé|Chad:N'Djamena|"
        "Egypt:Cairo|Eritrea:Asmara|Ethiopia:Addis Ababa|Ghana:Accra|Kenya:Nairobi|"
        "Liberia:Monrovia|Libya:Tripoli|Madagascar:Antananarivo|Malawi:Lilongwe|Mali:Bamako|"
        "Morocco:Rabat|Mozambique:Maputo|Namibia:Windhoek|Nigeria:Abuja|Rwanda:Kigali|"
        "São Tomé and Príncipe:São Tomé|Senegal:Dakar|Somalia:Mogadishu|Sudan:Khartoum|"
        "Togo:Lomé|Tunisia:Tunis|Uganda:Kampala|Zambia:Lusaka|Zimbabwe:Harare"
    ),
    "North America": (
        "the Bahamas:Nassau|Canada:Ottawa|Costa Rica:San José|Cuba:Havana|"
        "Guatemala:Guatemala City|Haiti:Port-au-Prince|Honduras:Tegucigalpa|Jamaica:Kingston|"
        "Mexico:Mexico City|Nicaragua:Managua|Panama:Panama City|the United States:Washington"
    ),
    "South America": (
        "Argentina:Buenos Aires|Brazil:Brasília|Chile:Santiago|Colombia:Bogotá|Ecuador:Quito|"
        "Guyana:Georgetown|Paraguay:Asunción|Peru:Lima|Uruguay:Montevideo|Venezuela:Caracas"
    ),
    "Oceania": "Australia:Canberra|Fiji:Suva|New Zealand:Wellington|Samoa:Apia|Tonga:Nuku'alofa",
}

COUNTRIES: tuple[tuple[str, str, str], ...] = tuple(
    (*entry.split(":"), continent)  # type: ignore[misc]
    for continent, entries in _BY_CONTINENT.items()
    for entry in entries.split("|")
)
"""(country, capital, continent)."""

CAPITALS: tuple[str, ...] = tuple(capital for _, capital, _ in COUNTRIES)

_ASK_CAPITAL = (
    "What is the capital of {c}?",
    "What's the capital of {c}?",
    "Name the capital of {c}.",
    "Which city is the capital of {c}?",
    "Tell me the capital of {c}.",
    "Do you know the capital of {c}?",
    "Capital of {c}?",
    "capital of {c}",
    "I need the capital city of {c}.",
    "Please tell me the capital of {c}.",
    "What is {c}'s capital?",
    "Can you name the capital of {c}?",
)
_ASK_COUNTRY = (
    "{k} is the capital of which country?",
    "Which country has {k} as its capital?",
    "Of which country is {k} the capital?",
)
_ASK_CONTINENT = (
    "On which continent is {c}?",
    "Which continent is {c} in?",
    "What continent does {c} belong to?",
    "Where is {c}?",
    "Tell me the continent of {c}.",
    "In which part of the world is {c}?",
)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def capitals(rng: Random) -> Exchange:
    country, capital, _ = rng.choice(COUNTRIES)
    if rng.random() < 0.25:
        question = rng.choice(_ASK_COUNTRY).format(k=capital)
        expected = country
    else:
        question = rng.choice(_ASK_CAPITAL).format(c=country)
        expected = capital
    answer = f"The capital of {country} is {capital}."
    return Exchange("capitals", question, answer, expected, question)


def continents(rng: Random) -> Exchange:
    country, _, continent = rng.choice(COUNTRIES)
    question = rng.choice(_ASK_CONTINENT).format(c=country)
    answer = f"{_sentence(country)} is in {continent}."
    return Exchange("continents", question, answer, continent, question)
