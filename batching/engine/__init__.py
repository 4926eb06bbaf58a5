"""One child process per model replica (scheduler + worker) and the asyncio client that talks to it."""
