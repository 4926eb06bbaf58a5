"""OpenAI's Responses API: a chat turn as items and events, kept to be continued."""
