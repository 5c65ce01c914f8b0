//! The way out of a raw terminal: `~` after a newline, as in cu(1) and ssh(1).

/// What the user wants of rhyve rather than of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// `~.`
    Stop,
    /// `~^Z`
    Suspend,
    /// `~?`
    Help,
}

/// What `~?` prints.
pub(super) const HELP: &str = "\r\n\
    ~.   stop the virtual machine and leave\r\n\
    ~^Z  suspend rhyve\r\n\
    ~~   send one ~\r\n\
    ~?   this list\r\n\
    (the escape is recognized at the start of a line only)\r\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    LineStart,
    Inside,
    Tilde,
}

/// Finds escape sequences in what is typed.
#[derive(Debug)]
pub(super) struct Escape(State);

impl Escape {
    pub(super) fn new() -> Self {
        Self(State::LineStart)
    }

    /// Appends what the guest is to get of `typed` to `pass`, one byte more than `typed` at most,
    /// and returns what rhyve is to do.
    pub(super) fn filter(&mut self, typed: &[u8], pass: &mut Vec<u8>) -> Vec<Action> {
        let mut actions = Vec::new();
        for &byte in typed {
            let action = match (self.0, byte) {
                (State::LineStart, b'~') => {
                    self.0 = State::Tilde;
                    continue;
                }
                (State::Tilde, b'.') => Some(Action::Stop),
                (State::Tilde, 0x1a) => Some(Action::Suspend),
                (State::Tilde, b'?') => Some(Action::Help),
                (State::Tilde, b'~') => None,
                (State::Tilde, _) => {
                    pass.push(b'~');
                    None
                }
                _ => None,
            };
            self.0 = match (action, byte) {
                (Some(_), _) | (None, b'\r' | b'\n') => State::LineStart,
                _ => State::Inside,
            };
            match action {
                Some(action) => actions.push(action),
                None => pass.push(byte),
            }
        }
        actions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(pieces: &[&[u8]]) -> (Vec<u8>, Vec<Action>) {
        let (mut escape, mut pass, mut actions) = (Escape::new(), Vec::new(), Vec::new());
        for piece in pieces {
            actions.extend(escape.filter(piece, &mut pass));
        }
        (pass, actions)
    }

    #[test]
    fn only_at_the_start_of_a_line() {
        assert_eq!(run(&[b"a~.\r"]), (b"a~.\r".to_vec(), vec![]));
        assert_eq!(run(&[b"~."]), (vec![], vec![Action::Stop]));
        assert_eq!(
            run(&[b"ls\r", b"~", b"."]),
            (b"ls\r".to_vec(), vec![Action::Stop])
        );
        assert_eq!(
            run(&[b"\n~\x1a~?x"]),
            (b"\nx".to_vec(), vec![Action::Suspend, Action::Help])
        );
    }

    #[test]
    fn tildes_get_through() {
        assert_eq!(run(&[b"~~."]), (b"~.".to_vec(), vec![]));
        assert_eq!(run(&[b"~", b"root\r~\r"]), (b"~root\r~\r".to_vec(), vec![]));
    }
}
