//! A queue that grows by a quarter where `VecDeque` would double, so that it never holds much more
//! than its items.

use std::collections::VecDeque;

/// Room added at least.
const ROOM: usize = 16;

/// Oldest first.
pub struct Queue<T>(VecDeque<T>);

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Queue(VecDeque::new())
    }
}

impl<T> Queue<T> {
    pub fn push(&mut self, item: T) {
        if self.0.len() == self.0.capacity() {
            self.0.reserve_exact(self.0.len() / 4 + ROOM);
        }
        self.0.push_back(item);
    }

    pub fn pop(&mut self) -> Option<T> {
        self.0.pop_front()
    }

    pub fn oldest(&self) -> Option<&T> {
        self.0.front()
    }

    pub fn get(&self, at: usize) -> Option<&T> {
        self.0.get(at)
    }

    pub fn get_mut(&mut self, at: usize) -> Option<&mut T> {
        self.0.get_mut(at)
    }

    pub fn remove(&mut self, at: usize) -> Option<T> {
        self.0.remove(at)
    }

    /// Forgets the items for which `keep` is false, and gives back memory when many went.
    pub fn retain(&mut self, keep: impl FnMut(&T) -> bool) {
        self.0.retain(keep);
        if self.0.capacity() > 2 * self.0.len() + ROOM {
            self.0.shrink_to_fit();
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<T>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_follows_the_items() {
        let mut queue = Queue::default();
        for item in 0..100_000u64 {
            queue.push(item);
            assert!(queue.bytes() <= (queue.len() * 5 / 4 + ROOM) * 8);
        }
        queue.retain(|item| item % 1000 == 0);
        assert_eq!(queue.iter().copied().collect::<Vec<_>>(), (0..100_000).step_by(1000).collect::<Vec<_>>());
        assert!(queue.bytes() <= (queue.len() * 2 + ROOM) * 8);
    }
}
