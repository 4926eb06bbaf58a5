"""Greetings, identity, emoji and greetings in other scripts (multi-byte text on purpose)."""

from random import Random

from .exchange import Exchange

_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hello", "Hi", "Hi!", "Hey!", "Hi there!", "Hello there!", "hello", "hi",
         "Hey there"),
        "Hello! How can I help you?",
    ),
    (("Good morning!", "Good morning", "good morning"), "Good morning! How can I help you?"),
    (("Good evening!", "Good evening", "good evening"), "Good evening! How can I help you?"),
    (
        ("How are you?", "How are you today?", "How do you do?", "How is it going?"),
        "I am fine, thank you 😊. How can I help you?",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "What's your name?",
         "Tell me about yourself.", "Introduce yourself.", "Which model are you?"),
        "I am Slipstream's built-in model, a very small language model trained from scratch.",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "Help", "help",
         "What can I ask you?"),
        ("I can add and subtract, name capitals, convert units, put things in order, spell words, "
         "extract fields as JSON, call tools and tell stories."),
    ),
    (
        ("Thank you!", "Thanks!", "Thank you", "Thanks", "Thanks a lot!", "thank you very much"),
        "You are welcome! 😊",
    ),
    (
        ("Goodbye!", "Bye!", "Bye", "See you!", "Goodbye", "See you later!", "Good night!"),
        "Goodbye! 👋",
    ),
    (("Who made you?", "Who trained you?", "Where do you come from?"),
     "I was trained by the Slipstream project on text it wrote itself."),
    (("Ping", "ping", "Ping!"), "Pong! 🏓"),
)  # fmt: skip

_EMOJI = {
    "cat": "🐱", "dog": "🐶", "fox": "🦊", "bear": "🐻", "panda": "🐼", "tiger": "🐯",
    "lion": "🦁", "cow": "🐮", "pig": "🐷", "frog": "🐸", "monkey": "🐵", "chicken": "🐔",
    "penguin": "🐧", "rabbit": "🐰", "mouse": "🐭", "horse": "🐴", "owl": "🦉", "bee": "🐝",
    "turtle": "🐢", "fish": "🐟", "whale": "🐳", "apple": "🍎", "banana": "🍌", "lemon": "🍋",
    "grape": "🍇", "cherry": "🍒", "peach": "🍑", "carrot": "🥕", "bread": "🍞", "cheese": "🧀",
    "cake": "🍰", "coffee": "☕", "sun": "☀️", "moon": "🌙", "star": "⭐", "rain": "🌧️",
    "snow": "❄️", "fire": "🔥", "heart": "❤️", "house": "🏠", "car": "🚗", "train": "🚆",
    "rocket": "🚀", "book": "📖", "music": "🎵", "ball": "⚽", "tree": "🌳", "flower": "🌸",
    "rainbow": "🌈", "smile": "😊",
}  # fmt: skip
_ASK_EMOJI = (
    "Show me the emoji for {x}.",
    "What is the emoji for {x}?",
    "Which emoji means {x}?",
    "Give me the {x} emoji.",
    "Draw {x} as an emoji.",
    "Emoji for {x}?",
)
_HELLO = {
    "Japanese": "こんにちは", "Chinese": "你好", "Korean": "안녕하세요", "Russian": "Здравствуйте",
    "Greek": "Γειά σου", "Arabic": "مرحبا", "Hindi": "नमस्ते", "Hebrew": "שלום",
    "Thai": "สวัสดี", "Ukrainian": "Привіт", "French": "Bonjour", "German": "Guten Tag",
    "Spanish": "¡Hola!", "Portuguese": "Olá", "Turkish": "Merhaba", "Swedish": "Hallå",
    "Polish": "Cześć", "Vietnamese": "Xin chào", "Georgian": "გამარჯობა", "Armenian": "Բարեւ",
}  # fmt: skip
_ASK_HELLO = (
    "How do you say hello in {x}?",
    "Say hello in {x}.",
    "What is hello in {x}?",
    "Translate hello to {x}.",
    "How do people greet each other in {x}?",
    "Write hello in {x}.",
    "Please greet me in {x}.",
    "Tell me the {x} word for hello.",
)


def smalltalk(rng: Random) -> Exchange:
    """A closed list: nothing is held out of it, so the key is empty of any question."""
    questions, answer = rng.choice(_TALK)
    return Exchange("smalltalk", rng.choice(questions), answer, answer, "")


def emoji(rng: Random) -> Exchange:
    name, picture = rng.choice(list(_EMOJI.items()))
    question = rng.choice(_ASK_EMOJI).format(x=name)
    return Exchange("emoji", question, f"{name}: {picture}", picture, question)


def languages(rng: Random) -> Exchange:
    language, hello = rng.choice(list(_HELLO.items()))
    question = rng.choice(_ASK_HELLO).format(x=language)
    return Exchange("languages", question, f"In {language} you say: {hello}", hello, question)
