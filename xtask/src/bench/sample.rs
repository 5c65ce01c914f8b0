//! Several measurements of the same thing.

use serde::{Deserialize, Serialize};

/// Measurements with their median and spread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The middle one; of an even number, the mean of the two in the middle.
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// In the order in which they were taken.
    pub runs: Vec<f64>,
}

impl From<Vec<f64>> for Sample {
    fn from(runs: Vec<f64>) -> Self {
        let mut sorted = runs.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let count = sorted.len();
        Self {
            median: (at(count.saturating_sub(1) / 2) + at(count / 2)) / 2.0,
            min: at(0),
            max: at(count.saturating_sub(1)),
            runs,
        }
    }
}

impl Sample {
    /// How many times the other it is: the median of what each round came to. Both were measured by turns in
    /// a round, so that what slowed the machine down meanwhile slowed both.
    pub fn ratio(&self, other: &Sample) -> f64 {
        let rounds = self.runs.iter().zip(&other.runs);
        Sample::from(rounds.map(|(a, b)| a / b).collect::<Vec<_>>()).median
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_spread() {
        let odd = Sample::from(vec![3.0, 1.0, 2.0]);
        assert_eq!((odd.min, odd.median, odd.max), (1.0, 2.0, 3.0));
        let even = Sample::from(vec![4.0, 1.0, 2.0, 3.0]);
        assert_eq!((even.min, even.median, even.max), (1.0, 2.5, 4.0));
        assert_eq!(even.runs, [4.0, 1.0, 2.0, 3.0]);
    }

    #[test]
    fn a_ratio_is_of_rounds() {
        let one = Sample::from(vec![3.0, 10.0, 6.0]);
        let other = Sample::from(vec![2.0, 5.0, 2.0]);
        assert_eq!(one.ratio(&other), 2.0);
    }
}
