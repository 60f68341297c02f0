//! A cache without pages: a policy, a capacity and reference bits. The simulator and the tests
//! run the pager's policies through it, request by request.

use std::collections::HashMap;

use super::Policy;
use crate::units::{PageCount, PageIndex};

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The page was resident.
    Hit,
    /// It was not, and is now.
    Miss {
        /// Whom it displaced, when the cache was full.
        victim: Option<PageIndex>,
    },
}

/// How much of the hits the policy learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sees {
    /// Each: the best that sampling could do, and what `lru` needs.
    Hits,
    /// None: what a pager of mapped pages sees when nothing samples their accessed bits.
    Faults,
}

/// The cache. A miss sets the page's reference bit, as a pager's load on demand does.
pub struct Cache {
    policy: Box<dyn Policy>,
    capacity: PageCount,
    sees: Sees,
    /// The resident pages and their reference bits.
    resident: HashMap<PageIndex, bool>,
}

impl Cache {
    /// An empty cache whose policy sees hits.
    ///
    /// # Panics
    /// When `capacity` is zero or the policy knows pages already.
    pub fn new(policy: Box<dyn Policy>, capacity: PageCount) -> Self {
        Cache::that_sees(Sees::Hits, policy, capacity)
    }

    /// An empty cache whose policy sees what is stated.
    ///
    /// # Panics
    /// As [`Cache::new`].
    pub fn that_sees(sees: Sees, policy: Box<dyn Policy>, capacity: PageCount) -> Self {
        assert!(capacity.0 > 0, "a cache holds at least one page");
        assert!(policy.is_empty(), "the policy of a new cache knows no page");
        Cache { policy, capacity, sees, resident: HashMap::new() }
    }

    /// A use of `page`.
    pub fn request(&mut self, page: PageIndex) -> Request {
        if let Some(referenced) = self.resident.get_mut(&page) {
            if self.sees == Sees::Hits {
                *referenced = true;
                self.policy.hit(page);
            }
            return Request::Hit;
        }
        let full = self.resident.len() as u64 == self.capacity.0;
        let victim = full.then(|| self.evict());
        self.resident.insert(page, true);
        self.policy.insert(page);
        Request::Miss { victim }
    }

    /// Makes room for one page. A policy that spares all pages has cleared their bits, and is asked
    /// again.
    fn evict(&mut self) -> PageIndex {
        let resident = &mut self.resident;
        let mut referenced = |page| resident.get_mut(&page).is_some_and(std::mem::take);
        let victim = self.policy.victim(&mut referenced).or_else(|| self.policy.victim(&mut referenced));
        let victim = victim.expect("a policy that has cleared all bits names a victim");
        assert!(self.resident.remove(&victim).is_some(), "{victim:?} was not resident");
        victim
    }

    /// Whether `page` is resident.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.resident.contains_key(&page)
    }

    /// Resident pages.
    pub fn len(&self) -> PageCount {
        PageCount(self.resident.len() as u64)
    }

    /// Whether nothing is resident.
    pub fn is_empty(&self) -> bool {
        self.resident.is_empty()
    }

    /// The policy.
    pub fn policy(&self) -> &dyn Policy {
        &*self.policy
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{NAMES, by_name};

    #[test]
    fn requests_say_what_came_of_them() {
        for name in NAMES {
            let mut cache = Cache::new(by_name(name).unwrap(), PageCount(1));
            assert_eq!(cache.request(PageIndex(7)), Request::Miss { victim: None });
            assert_eq!(cache.request(PageIndex(7)), Request::Hit);
            assert_eq!(cache.request(PageIndex(8)), Request::Miss { victim: Some(PageIndex(7)) });
            assert!(cache.contains(PageIndex(8)) && !cache.contains(PageIndex(7)));
            assert_eq!(cache.len(), PageCount(1));
        }
    }

    #[test]
    fn only_a_cache_that_sees_hits_tells_them() {
        for (sees, first) in [(Sees::Hits, 1), (Sees::Faults, 0)] {
            let mut cache = Cache::that_sees(sees, by_name("lru").unwrap(), PageCount(2));
            assert_eq!([0, 1, 0].map(|page| cache.request(PageIndex(page)))[2], Request::Hit);
            assert_eq!(cache.request(PageIndex(2)), Request::Miss { victim: Some(PageIndex(first)) });
        }
    }
}
