"""The wire protocol between VMMs and interceptd, sans I/O.

Owns what both sides share. Must not know trio, sockets or logging. The normative text is
`protocol/README.md`.

For users, and stable as `intercept_client` is: `messages` (every request and reply), `events`, `addresses`,
`outcomes`, `errors`, `hv_message` and `memory_intercept` (the hypervisor's 256 bytes). A VMM in Python needs
none of them: `intercept_client` exports what it uses. For those who write another client or server: `rpc`
(framing), `codec` (typed messages to and from maps), `elements` (errors about an element of a list),
`handoff` (how a VMM that restores hands its memory over) and `text` (what others sent, safe to show). For
those who read traces, recordings and working sets (`protocol/RECORDING.md`): `trace` (the records),
`recording` and `working_set` (the files).
"""
