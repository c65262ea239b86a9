"""The language model: loading, adapters, capabilities, forward. The only home of its quirks."""
