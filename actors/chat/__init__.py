"""An OpenAI-compatible endpoint per episode: agents written for that protocol are trained as they are.

::

    agent ── POST /SESSION/v1/chat/completions ──► ChatServer ──► ChatSession ── prompt ids ──► policy ──► engine
      ▲                                                              │  ▲
      └──────────────── message, tool calls, chunks ─────────────────┘  └── ids, log μ, version spans: recorded

The agent sees text; what is trained are the tokens behind it. A conversation that goes on is recognised by its
messages, so its earlier answers keep the tokens that were sampled, whatever they would look like tokenised again.
"""

from slime_async.actors.chat.agent import AgentEpisode
from slime_async.actors.chat.server import ChatServer
from slime_async.actors.chat.session import ChatSession

__all__ = ["AgentEpisode", "ChatServer", "ChatSession"]
