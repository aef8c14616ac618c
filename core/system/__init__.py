"""Files written whole, exits and signals, parallel work, several processes; nothing about CT."""
