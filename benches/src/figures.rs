//! Figures of one kind, and the line of a table that tells of them.

/// Figures of one kind.
#[derive(Debug, Clone, Default)]
pub struct Figures(Vec<f64>);

impl Figures {
    /// Adds one.
    pub fn add(&mut self, figure: f64) {
        self.0.push(figure);
    }

    /// The figure that `percent` of them do not exceed; none of nothing.
    #[must_use]
    pub fn at(&self, percent: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let i = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
        sorted.get(i).copied().unwrap_or(f64::NAN)
    }

    /// Prints a line of a table: what, how many, and three of them.
    pub fn row(&self, what: &str) {
        let [p50, p90, p99] = [50, 90, 99].map(|percent| self.at(percent));
        println!("| {what} | {} | {p50:.2} | {p90:.2} | {p99:.2} |", self.0.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_whatever_their_order() {
        let mut figures = Figures::default();
        assert!(figures.at(50).is_nan());
        (0..100).rev().for_each(|i| figures.add(f64::from(i)));
        assert_eq!([0, 50, 99, 100].map(|percent| figures.at(percent)), [0.0, 50.0, 99.0, 99.0]);
    }
}
