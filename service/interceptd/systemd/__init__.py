"""What systemd is told, and the sockets it passes."""
