//! Whether frames come one at a time, as questions and answers do, or in streams.

/// A frame of at most so many bytes, with its header, is small.
pub(super) const SMALL: usize = 2048;
/// So many waits for one small frame each are a habit.
const HABIT: u8 = 8;

/// What a thread's waits were for.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Frames since the last wait.
    frames: u32,
    /// One of them was not small.
    large: bool,
    /// Waits in a row that brought one small frame each, up to [`HABIT`].
    habit: u8,
}

impl Pace {
    /// A frame of `len` bytes was moved.
    pub fn moved(&mut self, len: usize) {
        self.frames = self.frames.saturating_add(1);
        self.large |= len > SMALL;
    }

    /// There is nothing to do but to wait. A wait that brought no frame says nothing.
    pub fn waits(&mut self) {
        match (self.frames, self.large) {
            (0, _) => {}
            (1, false) => self.habit = HABIT.min(self.habit + 1),
            _ => self.habit = 0,
        }
        (self.frames, self.large) = (0, false);
    }

    /// Whether small frames come one at a time, as far as can be told.
    pub fn is_single(&self) -> bool {
        self.habit == HABIT && self.frames <= 1 && !self.large
    }

    /// Whether what came since the last wait is all, by habit.
    pub fn is_enough(&self) -> bool {
        self.is_single() && self.frames == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_habit_takes_time_and_ends_at_once() {
        let mut pace = Pace::default();
        let lone = |pace: &mut Pace| {
            pace.moved(SMALL);
            pace.waits();
        };
        for _ in 1..HABIT {
            lone(&mut pace);
        }
        assert!(!pace.is_single());
        lone(&mut pace);
        assert!(pace.is_single());
        // The end of a time, not of a wait for frames.
        pace.waits();
        assert!(pace.is_single());
        pace.moved(60);
        assert!(pace.is_single());
        pace.moved(60);
        assert!(!pace.is_single(), "two at once");
        pace.waits();
        assert!(!pace.is_single());
        for _ in 0..HABIT {
            lone(&mut pace);
        }
        assert!(pace.is_single());
        pace.moved(SMALL + 1);
        assert!(!pace.is_single(), "a large one");
        pace.waits();
        lone(&mut pace);
        assert!(!pace.is_single());
    }
}
