//! The state of a chat: what was said, and which of it the session's KV already holds. Pure.
//!
//! Each turn renders the whole conversation again and sends only what follows the part the session
//! holds (docs/decisions/0051).

use engine::Message;

/// What was said so far.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    system: Option<String>,
    messages: Vec<Message>,
}

impl Conversation {
    /// Nothing said yet.
    pub fn new(system: Option<String>) -> Self {
        Self {
            system,
            messages: Vec::new(),
        }
    }

    /// Forgets what was said; the system message stays.
    pub fn reset(&mut self) {
        self.messages.clear();
    }

    /// Replaces the system message.
    pub fn set_system(&mut self, system: Option<String>) {
        self.system = system;
    }

    /// The user speaks.
    pub fn ask(&mut self, text: impl Into<String>) {
        self.messages.push(Message::new("user", text));
    }

    /// The model has spoken.
    pub fn answer(&mut self, text: impl Into<String>) {
        self.messages.push(Message::new("assistant", text));
    }

    /// Takes the last question back, as if it had not been asked.
    pub fn take_back(&mut self) {
        self.messages.pop();
    }

    /// Everything, the system message first.
    pub fn messages(&self) -> Vec<Message> {
        let system = self
            .system
            .iter()
            .map(|text| Message::new("system", text.as_str()));
        system.chain(self.messages.iter().cloned()).collect()
    }
}

/// A line the user typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// Words for the model.
    Say(&'a str),
    /// `/help`.
    Help,
    /// `/reset`.
    Reset,
    /// `/system TEXT`; without text the system message goes.
    System(Option<&'a str>),
    /// `/quit`.
    Quit,
    /// Nothing but spaces.
    Blank,
    /// A slash and something else.
    Unknown(&'a str),
}

impl<'a> Line<'a> {
    /// Reads a line; `//` begins words that start with a slash.
    pub fn parse(line: &'a str) -> Self {
        let line = line.trim();
        let Some(command) = line.strip_prefix('/') else {
            return if line.is_empty() {
                Line::Blank
            } else {
                Line::Say(line)
            };
        };
        let (word, rest) = command
            .split_once(char::is_whitespace)
            .unwrap_or((command, ""));
        let rest = rest.trim();
        match word {
            "help" | "?" => Line::Help,
            "reset" => Line::Reset,
            "system" => Line::System((!rest.is_empty()).then_some(rest)),
            "quit" | "exit" | "q" => Line::Quit,
            _ if word.starts_with('/') => Line::Say(command),
            _ => Line::Unknown(word),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slash_commands() {
        assert_eq!(Line::parse("  hello there "), Line::Say("hello there"));
        assert_eq!(
            Line::parse("/system You are terse."),
            Line::System(Some("You are terse."))
        );
        assert_eq!(Line::parse("/system"), Line::System(None));
        assert_eq!(Line::parse("/quit"), Line::Quit);
        assert_eq!(Line::parse("/wat now"), Line::Unknown("wat"));
        assert_eq!(
            Line::parse("//etc is a folder"),
            Line::Say("/etc is a folder")
        );
        assert_eq!(Line::parse(""), Line::Blank);
    }

    #[test]
    fn the_system_message_comes_first_and_survives_a_reset() {
        let mut chat = Conversation::new(Some("be kind".into()));
        chat.ask("hi");
        chat.answer("hello");
        assert_eq!(chat.messages().len(), 3);
        chat.reset();
        assert_eq!(chat.messages().len(), 1);
    }
}
