"""A model for many users at once, over HTTP.

Border: everything between bytes of a request and the language model's tokens; what the model is
and how a conversation is read stand in other rooms.
"""
