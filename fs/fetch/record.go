package fetch

import (
	"sync"
	"time"

	"lazuli/fs/store"
)

// A Touch is a read of an object.
type Touch struct {
	Key    store.Key
	Off, N int64         // bytes of the file
	After  time.Duration // the recording began
}

// A Recorder writes down what is read of objects, in its order, from [Queue.Record] on.
type Recorder struct {
	begun time.Time
	mu    sync.Mutex
	list  []Touch
}

// maxTouches bounds what one recorder keeps: 1 GiB read in pages.
const maxTouches = 1 << 18

// Record begins to write down every read of an object until stop is called, which returns them. Reads of what is in the store do not
// come here unless the mount was made so that they do.
func (q *Queue) Record() (stop func() []Touch) {
	r := &Recorder{begun: time.Now()}
	q.recorder.Store(r)
	return func() []Touch {
		q.recorder.CompareAndSwap(r, nil)
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.list
	}
}

func (r *Recorder) touch(key store.Key, off, n int64) {
	at := time.Since(r.begun)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.list) < maxTouches {
		r.list = append(r.list, Touch{Key: key, Off: off, N: n, After: at})
	}
}
