package fetch

import (
	"sync"
	"time"
)

// A link is what was seen of the way to the registries: how long until an answer begins, and how fast it comes. Registries are
// seen as one, since a node has mostly one.
type link struct {
	mu    sync.Mutex
	trips [16]time.Duration // of the last requests, until their first byte
	next  int
	rate  float64 // bytes per second, of large answers, the later the more
}

// Windows of readers whose way is not known yet, and bounds of all.
const (
	minWindow = 512 << 10
	topWindow = 4 << 20
)

// answered notes an answer: of n bytes, which began after first and took rest from then on.
func (k *link) answered(n int64, first, rest time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.trips[k.next] = max(first, 1)
	k.next = (k.next + 1) % len(k.trips)
	const large = 256 << 10 // what is smaller says more about the first byte
	if n < large {
		return
	}
	rate := float64(n) / max(rest, 10*time.Microsecond).Seconds()
	if k.rate == 0 {
		k.rate = rate
	}
	k.rate += (rate - k.rate) / 4
}

// window returns how many bytes come in the time that an answer takes to begin: fetching so much more than is asked for makes a read that
// would wait for an answer of its own as slow as one that need not, at worst.
func (k *link) window() int64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	trip := time.Duration(0)
	for _, t := range k.trips { // the shortest: others waited for connections or for each other
		if t > 0 && (trip == 0 || t < trip) {
			trip = t
		}
	}
	if trip == 0 || k.rate == 0 {
		return firstWindow
	}
	return min(max(int64(k.rate*trip.Seconds()), minWindow), topWindow)
}

// speed returns how fast large answers come, in bytes per second, or 0 if that is not known.
func (k *link) speed() int64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return int64(k.rate)
}
