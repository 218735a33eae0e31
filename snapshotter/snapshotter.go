package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	cfs "github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/singleflight"

	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
	"lazuli/fs/toc"
	"lazuli/fs/upper"
)

// Options configures a Snapshotter. Its zero value is the recommendation.
type Options struct {
	Logger *slog.Logger // nil is silent
	// Unverified leaves diffIDs of lazy layers unverified when the layers have arrived: see docs/security.md.
	Unverified bool
}

// A Snapshotter is containerd's over a node's store.
type Snapshotter struct {
	node *rootfs.Node
	root string // snapshots/ in the node's root folder
	ms   *storage.MetaStore
	log  *slog.Logger

	ctx    context.Context // ends at Close; the life of what goes on behind the calls
	cancel context.CancelFunc
	work   sync.WaitGroup

	mounting singleflight.Group // by id
	pulls    pulls
	verifier rootfs.Verifier // of what is filled; nil if nothing is verified

	mu       sync.Mutex
	closed   bool
	mounted  map[string]func()        // by id: what lets go of the layers
	removing map[string]bool          // ids whose folders are being removed
	verifies map[string]*verification // by id
	idle     *sync.Cond               // on mu: removing became empty
	sweeping bool                     // something looks for metadata images that nobody uses
	again    bool                     // and it is to look once more
	gone     []string                 // chains of images that were removed, for it to look at
	fallback []Fallback               // the last ones
}

// A Fallback is a layer that containerd was left to unpack although it could have been lazy.
type Fallback struct {
	Image string `json:"image"`
	Layer string `json:"layer"`
	Why   string `json:"why"`
}

// Open returns the snapshotter of a node, which must be a daemon's and outlives it, and takes over what is mounted. What it
// takes over is served after the caller has called [rootfs.Node.Serve].
func Open(node *rootfs.Node, o Options) (*Snapshotter, error) {
	s := &Snapshotter{
		node: node, root: filepath.Join(node.Root(), "snapshots"), log: o.Logger,
		mounted: map[string]func(){}, removing: map[string]bool{}, verifies: map[string]*verification{},
	}
	s.idle = sync.NewCond(&s.mu)
	if !o.Unverified {
		s.verifier = s.verifyFilled
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	// Whoever runs a container gets a bind mount of what is in the folder. Nobody else has a way to it: root in a container can make
	// set-uid programs, which other users of the machine must not run (as in CVE-2021-41103).
	err := os.MkdirAll(s.root, 0o700)
	if err == nil {
		err = os.Chmod(s.root, 0o700)
	}
	if err != nil {
		return nil, err
	}
	if s.ms, err = storage.NewMetaStore(filepath.Join(s.root, "metadata.db")); err != nil {
		return nil, err
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if err := s.recover(); err != nil {
		s.Close()
		return nil, err
	}
	if !o.Unverified {
		s.work.Go(s.verifyLoop)
	}
	return s, nil
}

// recover makes the layers of what is mounted readable, and removes what no record names.
func (s *Snapshotter) recover() error {
	ids := map[string]bool{}
	err := s.each(s.ctx, func(id string, info snapshots.Info) error {
		ids[id] = true
		if info.Kind == snapshots.KindCommitted {
			return nil
		}
		mounted, err := rootfs.Mounted(s.dir(id, "rootfs"))
		if err != nil || !mounted {
			return err
		}
		record, err := rootfs.ReadRecord(s.dir(id, rootFile))
		if err != nil {
			return err
		}
		chain := s.node.Chain(record.Layers)
		release, err := chain.Use()
		if err != nil { // it keeps what is here
			s.log.Error("a mounted snapshot cannot be served", "snapshot", info.Name, "err", err)
			return nil
		}
		if info.Labels[snapshots.LabelSnapshotRef] == "" {
			release = s.filled(chain, release)
		}
		s.mounted[id] = release
		return nil
	})
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(s.root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() && !ids[e.Name()] {
			s.log.Info("removing what no snapshot needs", "dir", s.dir(e.Name()))
			s.removeBehind(e.Name())
		}
	}
	return nil
}

// each calls f for every snapshot with its number.
func (s *Snapshotter) each(ctx context.Context, f func(id string, info snapshots.Info) error) error {
	type snapshot struct {
		id   string
		info snapshots.Info
	}
	var list []snapshot
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		err := storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			id, _, _, err := storage.GetInfo(ctx, info.Name)
			list = append(list, snapshot{id, info})
			return err
		})
		if errdefs.IsNotFound(err) { // there never was one
			return nil
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, x := range list {
		if err := f(x.id, x.info); err != nil {
			return err
		}
	}
	return nil
}

// Stat returns the record of a snapshot.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update changes the mutable parts of a snapshot's record.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return updated, err
}

// Walk calls f for each snapshot that one of the filters matches.
func (s *Snapshotter) Walk(ctx context.Context, f snapshots.WalkFunc, filters ...string) error {
	return s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, f, filters...)
	})
}

// Usage returns what a snapshot takes of the disk, without its parents: of a committed one, how much of its layer's files is
// here, which grows while it is used.
func (s *Snapshotter) Usage(ctx context.Context, key string) (u snapshots.Usage, err error) {
	var id string
	var info snapshots.Info
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return u, err
	}
	if info.Kind == snapshots.KindCommitted {
		l, err := s.readLayer(id)
		if err != nil {
			return u, err
		}
		u.Inodes, u.Size, err = s.node.Here(l.record())
		return u, err
	}
	du, err := cfs.DiskUsage(ctx, s.dir(id, "fs"))
	if errors.Is(err, fs.ErrNotExist) { // a view, or one that is being removed
		return u, nil
	}
	return snapshots.Usage(du), err
}

// Prepare creates an active snapshot. If the labels say which layer containerd is going to unpack into it and that layer
// is lazy, it commits it instead and returns errdefs.ErrAlreadyExists.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	var base snapshots.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return nil, err
		}
	}
	if target := base.Labels[snapshots.LabelSnapshotRef]; target != "" {
		done, err := s.prepareLazy(ctx, target, key, parent, base.Labels, opts)
		if err != nil {
			return nil, err
		}
		if done {
			return nil, fmt.Errorf("snapshot %s is lazy and needs no unpacking: %w", target, errdefs.ErrAlreadyExists)
		}
	}
	return s.create(ctx, snapshots.KindActive, key, parent, opts)
}

// View creates a read-only snapshot.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	var snap storage.Snapshot
	var info snapshots.Info
	err := s.ms.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		if snap, err = storage.CreateSnapshot(ctx, kind, key, parent, opts...); err == nil {
			_, info, _, err = storage.GetInfo(ctx, key)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	mounts, err := s.mount(snap, info, true)
	if err != nil {
		err = fmt.Errorf("snapshot %s: %w", key, err)
		return nil, errors.Join(err, s.Remove(context.WithoutCancel(ctx), key))
	}
	return mounts, nil
}

// Mounts returns the mounts of an active snapshot, which it mounts if they are not: after a reboot, or after the object server
// was lost.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var snap storage.Snapshot
	var info snapshots.Info
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if snap, err = storage.GetSnapshot(ctx, key); err == nil {
			_, info, _, err = storage.GetInfo(ctx, key)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	mounts, err := s.mount(snap, info, false)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", key, err)
	}
	return mounts, nil
}

// mount makes what the snapshot's mounts show.
func (s *Snapshotter) mount(snap storage.Snapshot, info snapshots.Info, fresh bool) ([]mount.Mount, error) {
	option := "rw"
	if snap.Kind == snapshots.KindView {
		option = "ro"
	}
	bind := func(dir string) []mount.Mount {
		return []mount.Mount{{Type: "bind", Source: dir, Options: []string{"rbind", option}}}
	}
	if snap.Kind == snapshots.KindCommitted {
		return nil, fmt.Errorf("it is committed and has no mounts: %w", errdefs.ErrFailedPrecondition)
	}
	if err := s.makeDirs(snap); err != nil {
		return nil, err
	}
	if len(snap.ParentIDs) == 0 {
		return bind(s.dir(snap.ID, "fs")), nil
	}
	o := rootfs.Overlay{}
	unpack := info.Labels[snapshots.LabelSnapshotRef] != ""
	if snap.Kind == snapshots.KindActive && !unpack {
		o = rootfs.Overlay{Upper: s.dir(snap.ID, "fs"), Work: s.dir(snap.ID, "work"), New: fresh}
	}
	_, err, _ := s.mounting.Do(snap.ID, func() (any, error) { return nil, s.attach(snap, o, unpack) })
	if err != nil {
		return nil, err
	}
	if snap.Kind == snapshots.KindActive && unpack {
		// containerd unpacks into the upper folder itself, and asks the lower one only about directories that the layer
		// leaves out. Through a mount of both, a directory that the layer names again would keep xattrs that its
		// new entry does not have.
		return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{
			"upperdir=" + s.dir(snap.ID, "fs"), "workdir=" + s.dir(snap.ID, "work"), "lowerdir=" + s.dir(snap.ID, "rootfs"),
		}}}, nil
	}
	return bind(s.dir(snap.ID, "rootfs")), nil
}

func (s *Snapshotter) makeDirs(snap storage.Snapshot) error {
	if err := os.MkdirAll(s.dir(snap.ID), 0o711); err != nil {
		return err
	}
	for _, sub := range []string{"fs", "work", "rootfs"} {
		if err := os.Mkdir(s.dir(snap.ID, sub), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// attach mounts a snapshot's overlay, unless it is mounted on the object server that lives. unpack says that it is only there for a layer
// to be unpacked on it.
func (s *Snapshotter) attach(snap storage.Snapshot, o rootfs.Overlay, unpack bool) error {
	dir := s.dir(snap.ID, "rootfs")
	device, err := s.node.ServerDevice()
	if err != nil {
		return err
	}
	server := strconv.FormatUint(device, 10)
	mounted, err := rootfs.Mounted(dir)
	if err != nil {
		return err
	}
	if mounted {
		if b, _ := os.ReadFile(s.dir(snap.ID, serverFile)); string(b) == server {
			return nil
		}
		if err := s.detach(snap.ID); err != nil {
			return err
		}
	}
	layers, err := s.layers(snap.ParentIDs)
	if err != nil {
		return err
	}
	chain := s.node.Chain(layers)
	record := chain.Record()
	if err := record.Write(s.dir(snap.ID, rootFile)); err != nil {
		return err
	}
	if err := writeFile(s.dir(snap.ID, serverFile), []byte(server)); err != nil {
		return err
	}
	release, err := chain.Attach(dir, o)
	if err != nil {
		return err
	}
	over := func() {}
	if o.New { // a container is going to start
		over = s.learn(snap, chain)
	}
	if !unpack {
		release = s.filled(chain, release)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mounted[snap.ID] = func() { over(); release() }
	return nil
}

// learn has the start of a container recorded, until the returned function is called.
func (s *Snapshotter) learn(snap storage.Snapshot, chain rootfs.Chain) (over func()) {
	record, err := rootfs.ReadRecord(s.dir(snap.ParentIDs[0], rootfs.ImageRecord))
	if err != nil { // its parent is no image's
		return func() {}
	}
	digest, err := v1.NewHash(record.Digest)
	if err != nil {
		return func() {}
	}
	ref, err := remote.ParseReference(record.Reference)
	if err != nil {
		return func() {}
	}
	return chain.Learn(ref.At(digest), digest)
}

// filled has the rest of a chain that something runs from fetched behind, until the returned function is called, which
// calls release too.
func (s *Snapshotter) filled(chain rootfs.Chain, release func()) func() {
	stop := chain.Fill(s.verifier)
	return func() {
		stop()
		release()
	}
}

// detach unmounts a snapshot's overlay and lets go of its layers.
func (s *Snapshotter) detach(id string) error {
	if err := rootfs.Detach(s.dir(id, "rootfs")); err != nil {
		return fmt.Errorf("snapshot folder %s: %w", s.dir(id), err)
	}
	s.mu.Lock()
	release := s.mounted[id]
	delete(s.mounted, id)
	s.mu.Unlock()
	if release != nil {
		release()
	}
	return nil
}

// Commit makes a layer of what was written into an active snapshot.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	var snap storage.Snapshot
	var info snapshots.Info
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if _, _, _, err := storage.GetInfo(ctx, name); err == nil {
			return fmt.Errorf("snapshot %s: %w", name, errdefs.ErrAlreadyExists)
		}
		if snap, err = storage.GetSnapshot(ctx, key); err != nil {
			return err
		}
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return err
	}
	if snap.Kind != snapshots.KindActive {
		return fmt.Errorf("snapshot %s is not active, only active ones can be committed: %w", key, errdefs.ErrFailedPrecondition)
	}
	release, err := s.node.Hold()
	if err != nil {
		return err
	}
	defer release()
	l, err := s.scan(ctx, snap, info)
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", key, err)
	}
	if err := s.writeLayer(snap.ID, l); err != nil {
		return err
	}
	if err := s.node.Store().Sync(); err != nil {
		return err
	}
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, err := storage.CommitActive(ctx, key, name, snapshots.Usage{Size: l.record().Size}, opts...)
		return err
	})
	if err != nil {
		return err
	}
	if err := s.writeImage(info.Labels, snap); err != nil {
		s.log.Warn("the record of an image", "err", err)
	}
	// What was written is in the store now.
	for _, sub := range []string{"fs", "work", "rootfs", rootFile, serverFile} {
		if err := os.RemoveAll(s.dir(snap.ID, sub)); err != nil {
			s.log.Warn("what a committed snapshot needs no more", "err", err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweep()
	return nil
}

// scan puts the files that were written into the store, and returns the layer that they are.
func (s *Snapshotter) scan(ctx context.Context, snap storage.Snapshot, info snapshots.Info) (*layer, error) {
	if err := s.detach(snap.ID); err != nil {
		return nil, err
	}
	layers, err := s.layers(snap.ParentIDs)
	if err != nil {
		return nil, err
	}
	chain := s.node.Chain(layers)
	target := info.Labels[snapshots.LabelSnapshotRef]
	scan := upper.Scan{
		Upper: s.dir(snap.ID, "fs"), Store: s.node.Store(), Logger: s.log,
		// containerd has closed what it unpacked. In a container, somebody may still write.
		Move: target != "",
	}
	if len(layers) > 0 {
		if scan.Lower, err = chain.Mount(); err != nil {
			return nil, err
		}
		scan.Chunks = chain.Chunks()
	}
	t, err := scan.TOC(ctx)
	if err != nil {
		return nil, err
	}
	record, err := s.node.Keep(t)
	if err != nil {
		return nil, err
	}
	l := &layer{Verified: true}
	if q, ok := parseRequest(target, info.Labels); ok && q.manifest.Hex != "" {
		// If a file is ever lost, it can be had again.
		record.Digest, record.Reference = q.layer.String(), q.ref.At(q.manifest).String()
	}
	l.Layers = []rootfs.RecordLayer{record}
	return l, nil
}

// writeImage notes in the topmost layer's snapshot of which image it is.
func (s *Snapshotter) writeImage(labels map[string]string, snap storage.Snapshot) error {
	q, ok := parseRequest(labels[snapshots.LabelSnapshotRef], labels)
	if !ok || !q.top {
		return nil
	}
	layers, err := s.layers(append([]string{snap.ID}, snap.ParentIDs...))
	if err != nil {
		return err
	}
	return s.noteImage(snap.ID, q, layers)
}

// Remove abandons a snapshot. It returns at once; what the snapshot left is removed behind.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := s.ms.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		id, _, err = storage.Remove(ctx, key)
		return err
	})
	if err == nil {
		s.removeBehind(id)
	}
	return err
}

func (s *Snapshotter) removeBehind(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return // the next one finds the folder
	}
	s.removing[id] = true
	s.work.Go(func() {
		image, _ := rootfs.ReadRecord(s.dir(id, rootfs.ImageRecord)) // most snapshots have none
		s.pulls.removed(image.Chain)
		err := s.detach(id)
		if err == nil {
			err = os.RemoveAll(s.dir(id))
		}
		if err != nil {
			s.log.Error("cannot remove what a snapshot left", "dir", s.dir(id), "err", err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.removing, id)
		delete(s.verifies, id)
		s.gone = append(s.gone, image.Chain)
		s.sweep()
	})
}

// sweep has metadata images unmounted that nobody uses any more, behind. The caller holds s.mu.
func (s *Snapshotter) sweep() {
	if s.again = s.sweeping; s.sweeping || s.closed {
		return
	}
	s.sweeping = true
	s.work.Go(func() {
		for again := true; again; {
			s.mu.Lock()
			gone := s.gone
			s.gone = nil
			s.mu.Unlock()
			if err := s.node.Sweep(gone...); err != nil {
				s.log.Error("cannot unmount a metadata image", "err", err)
			}
			s.mu.Lock()
			again, s.again = s.again, false
			s.sweeping = again
			s.idle.Broadcast()
			s.mu.Unlock()
		}
	})
}

// Cleanup returns when what removed snapshots left is gone.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.idle.Broadcast()
	})
	defer stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for (len(s.removing) > 0 || s.sweeping) && ctx.Err() == nil {
		s.idle.Wait()
	}
	return context.Cause(ctx)
}

// Close ends the use of the records. What is mounted stays so.
func (s *Snapshotter) Close() error {
	s.mu.Lock()
	closed := s.closed
	s.closed = true
	s.mu.Unlock()
	if closed {
		return nil
	}
	s.cancel()
	s.work.Wait()
	return s.ms.Close()
}

// fellBack notes that a layer is unpacked that might have been lazy.
func (s *Snapshotter) fellBack(q request, why error) {
	f := Fallback{q.ref.String(), q.layer.String(), why.Error()}
	s.mu.Lock()
	defer s.mu.Unlock()
	const kept = 20
	if len(s.fallback) == kept {
		s.fallback = append(s.fallback[:0], s.fallback[1:]...)
	}
	s.fallback = append(s.fallback, f)
	if !errors.Is(why, toc.ErrNotLazy) {
		s.log.Warn("a layer is left to containerd to unpack", "image", f.Image, "layer", f.Layer, "why", f.Why)
	} else {
		s.log.Info("a layer is not lazy", "image", f.Image, "layer", f.Layer, "why", strings.TrimPrefix(f.Why, toc.ErrNotLazy.Error()+": "))
	}
}
