from pennyweight.data.conversation import Conversation, Dropped, Example, Message

__all__ = ["Conversation", "Dropped", "Example", "Message"]
