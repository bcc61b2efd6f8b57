"""How an engine talks to a node: one machine, an asyncio and a blocking driver."""
