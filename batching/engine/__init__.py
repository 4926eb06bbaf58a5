"""One child process per model replica (scheduler and worker), and its asyncio client."""
