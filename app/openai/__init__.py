"""OpenAI's endpoints for text: chats, completions, models, and the tokenizer beside them."""
