package rootfs

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"lazuli/fs/fetch"
)

// A FillPolicy says when the rest of an image that is mounted is fetched, so that what runs of it outlives its registry.
type FillPolicy int

const (
	FillAuto FillPolicy = iota // when the link has been idle for a while, and the disk has room
	FillOn                     // when what was started has come to rest for the first time
	FillOff                    // never
)

const (
	// idlePause is for how long nothing must have been wanted before FillAuto fetches, each time anew.
	idlePause = 30 * time.Second
	// startPause is the same for FillOn, once per image.
	startPause = time.Second
	// roomPause is after which it is looked again whether the disk has room.
	roomPause = time.Minute
	// What could not be had is tried again after firstRetry, and then after twice as long each time.
	firstRetry, lastRetry = time.Minute, time.Hour
)

// A fills fetches the rest of what is mounted, one image after the other, the one that was started last first.
type fills struct {
	log *slog.Logger
	// fetch fetches the rest of one image. It returns soon after ctx ended.
	fetch func(ctx context.Context, use useLayers) error

	ctx    context.Context // ends at close
	cancel context.CancelFunc
	work   sync.WaitGroup
	wake   chan struct{} // holds a token when the list has changed

	mu      sync.Mutex
	running bool
	list    []*filled // started last first
	current *filled
	stop    context.CancelFunc // of current
	left    chan struct{}      // closed when current is not used any more
}

// useLayers makes an image's layers readable, the lowest first, until release is called.
type useLayers func() (layers []fillLayer, release func(), err error)

// A fillLayer is a layer of which the rest is to be fetched.
type fillLayer struct {
	*fetch.Layer
	record RecordLayer
	verify Verifier // nil if nobody wants to know what is true of it
}

// A Verifier has a layer verified whose rest is to be fetched: read is [Node.VerifyDiffID] that waits for its turn as fills do, and needs not be called if
// the outcome is known. It returns what read does.
type Verifier func(ctx context.Context, r RecordLayer, read func(context.Context, RecordLayer) error) error

// A filled is an image that is mounted.
type filled struct {
	name  string // of what is mounted; several mounts of a chain have one
	use   useLayers
	users int

	whole    bool // all of it is here
	failures int
	again    time.Time // not before
}

func newFills(log *slog.Logger, fetch func(context.Context, useLayers) error) *fills {
	f := &fills{log: log, fetch: fetch, wake: make(chan struct{}, 1)}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	return f
}

// add has the rest of an image fetched until stop is called, which returns when the layers are not used any more.
func (f *fills) add(name string, use useLayers) (stop func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.IndexFunc(f.list, func(x *filled) bool { return x.name == name })
	var x *filled
	if i >= 0 {
		x = f.list[i]
		f.list = slices.Delete(f.list, i, i+1)
	} else {
		x = &filled{name: name, use: use}
	}
	x.users++
	x.again = time.Time{}
	f.list = slices.Insert(f.list, 0, x)
	if f.current != nil && f.current != x && !x.whole {
		f.stop() // it goes on after x
	}
	f.look()
	return sync.OnceFunc(func() { f.remove(x) })
}

// look has the loop look at the list. The caller holds f.mu.
func (f *fills) look() {
	if !f.running && f.ctx.Err() == nil {
		f.running = true
		f.work.Go(f.loop)
	}
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

func (f *fills) remove(x *filled) {
	f.mu.Lock()
	x.users--
	if x.users > 0 {
		f.mu.Unlock()
		return
	}
	f.list = slices.DeleteFunc(f.list, func(y *filled) bool { return y == x })
	var left chan struct{}
	if f.current == x {
		f.stop()
		left = f.left
	}
	f.mu.Unlock()
	if left != nil {
		<-left
	}
}

// close ends all of it and waits.
func (f *fills) close() {
	f.mu.Lock()
	f.cancel()
	f.mu.Unlock()
	f.work.Wait()
}

func (f *fills) loop() {
	for f.ctx.Err() == nil {
		x, ctx, after := f.next()
		if x != nil {
			f.ended(x, f.fetch(ctx, x.use), ctx)
			continue
		}
		var timer <-chan time.Time // none if nothing is to be tried again
		if after > 0 {
			timer = time.After(after)
		}
		select {
		case <-f.wake:
		case <-timer:
		case <-f.ctx.Done():
		}
	}
}

// next returns the image whose turn it is, or nil and after how long there may be one, 0 for not before the list changes.
func (f *fills) next() (x *filled, ctx context.Context, after time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, x := range f.list {
		wait := time.Until(x.again)
		switch {
		case x.whole:
		case wait <= 0:
			f.current, f.left = x, make(chan struct{})
			ctx, f.stop = context.WithCancel(f.ctx)
			return x, ctx, 0
		case after == 0 || wait < after:
			after = wait
		}
	}
	return nil, nil, after
}

// ended notes how the fetching of x ended, which ctx may have done.
func (f *fills) ended(x *filled, err error, ctx context.Context) {
	f.mu.Lock()
	defer f.mu.Unlock()
	stopped := ctx.Err() != nil
	f.stop()
	close(f.left)
	f.current, f.stop, f.left = nil, nil, nil
	switch {
	case err == nil:
		x.whole = true
		f.log.Debug("all of the image is here", "image", x.name)
	case !stopped:
		pause := min(firstRetry<<min(x.failures, 10), lastRetry)
		level := slog.LevelInfo
		if x.failures > 0 {
			level = slog.LevelDebug
		}
		x.failures++
		x.again = time.Now().Add(pause)
		f.log.Log(ctx, level, "the rest of an image cannot be fetched or verified now: it is tried again", "image", x.name, "in", pause, "err", err)
	}
}

// fillNow is fills.fetch of a node.
func (n *Node) fillNow(ctx context.Context, use useLayers) error {
	layers, release, err := use()
	if err != nil {
		return err
	}
	defer release()
	if n.o.Fill == FillOn {
		if err := n.queue.WaitIdle(ctx, startPause); err != nil {
			return err
		}
	}
	slices.Reverse(layers) // what an image was made for lies on top
	for _, l := range layers {
		if err := n.fillLayer(ctx, l); err != nil {
			return err
		}
	}
	return nil
}

// fillLayer fetches the rest of a layer. To be verified a layer must be read whole: if it was not yet, its rest comes by that, however much is
// here of it, and nothing is fetched twice. But where a pass has been dropped, another may never end: then the rest comes member by
// member. Of a layer that is here already there is nothing to fetch, and it is verified in any case.
func (n *Node) fillLayer(ctx context.Context, l fillLayer) error {
	if l.verify != nil && l.record.Lazy && !n.queue.Complete(l.Layer) && !n.unfinished(l.record) {
		turn := func(ctx context.Context) error {
			if n.queue.Complete(l.Layer) {
				return context.Cause(ctx)
			}
			return n.turn(ctx)
		}
		if err := turn(ctx); err != nil {
			return err
		}
		stopped := false
		err := l.verify(ctx, l.record, func(ctx context.Context, r RecordLayer) error {
			ended, err := n.pass(ctx, r, turn)
			stopped = !ended
			return err
		})
		if stopped {
			return err // it goes on the next time
		}
		if err != nil {
			// What lies runs on, and what cannot be verified.
			n.log.Debug("a layer was not verified while it was filled", "err", err)
		}
	}
	return n.queue.FillWhen(ctx, n.turn, l.Layer)
}

// turn returns when a fill may make a request.
func (n *Node) turn(ctx context.Context) error {
	if n.o.Fill == FillOn {
		return context.Cause(ctx)
	}
	for {
		if err := n.queue.WaitIdle(ctx, idlePause); err != nil {
			return err
		}
		if n.room() {
			return nil
		}
		select {
		case <-time.After(roomPause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// room reports whether a tenth of the store's disk is free, and what else has to say to it agrees.
func (n *Node) room() bool {
	var st unix.Statfs_t
	if err := unix.Statfs(n.root, &st); err != nil || st.Bavail < st.Blocks/10 {
		return false
	}
	return n.o.Room == nil || n.o.Room()
}

// Fill has the rest of the chain fetched, as [Options.Fill] says, until stop is called: for who has just mounted it. Nobody waits for it, and what cannot be had
// now is tried again later. verify is called for each lazy layer; nil is not.
func (c Chain) Fill(verify Verifier) (stop func()) {
	return c.n.fillBehind(c.ID(), func() ([]fillLayer, func(), error) {
		release, err := c.Use()
		if err != nil {
			return nil, nil, err
		}
		layers, err := c.queued()
		if err != nil {
			release()
			return nil, nil, err
		}
		list := make([]fillLayer, len(layers))
		for i, l := range layers {
			list[i] = fillLayer{l, c.Layers[i], verify}
		}
		return list, release, nil
	})
}

// FillBehind is [Chain.Fill] of an image that is mounted, with the credentials that it was mounted with. Nothing depends on its diffIDs, so
// they are not verified.
func (r *Rootfs) FillBehind() (stop func()) {
	if r.queued == nil { // it was adopted
		return r.Chain().Fill(nil)
	}
	return r.n.fillBehind(r.dir, func() ([]fillLayer, func(), error) {
		list := make([]fillLayer, len(r.queued))
		for i, l := range r.queued {
			list[i] = fillLayer{Layer: l}
		}
		return list, func() {}, nil
	})
}

func (n *Node) fillBehind(name string, use useLayers) (stop func()) {
	if n.o.Fill == FillOff {
		return func() {}
	}
	n.queue.Touch() // a start wants the link
	return n.fills.add(name, use)
}
