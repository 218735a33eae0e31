// Package rootfs mounts images: it puts the tables of contents, the metadata image, the store, the
// fetcher and the object server together into one directory.
//
// A [Node] is what all images of a machine share: the store, one queue, one object server. A
// [Rootfs] is one image at one directory:
//
//	overlay   upper    (with RW) what is written, thrown away at Close
//	          lower    the metadata image, an EROFS on a loop device
//	          data     the store's objects
//	          data     the object server, FUSE
//
// Nothing is mounted that came from a registry: the metadata image is built here, from tables of
// contents that were checked against the manifest. Nothing is left behind by a mount that did not
// succeed. Of a process that was killed, the next [Open] removes what it had mounted for itself.
//
// Folders below the root:
//
//	store/         see package store
//	images/        a record for each image that is kept (see [Node.Images])
//	profiles/      what was learned from starts, by repository and command
//	run/PID.N/     mount points and upper folders of a process; its lock file is locked while it lives
//
// and of a node that is a daemon's, whose mounts outlive the process (see [Options.Daemon]):
//
//	server/        where the object server is mounted
//	chains/CHAIN/  metadata images, mounted once for all that use them
//	mounts/N/      what run/PID.N/M is for others
//	snapshots/ID/  containerd's snapshots; of those, what this package knows are the records in them
package rootfs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"lazuli/fs/fetch"
	"lazuli/fs/meta"
	"lazuli/fs/remote"
	"lazuli/fs/serve"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// Options configures a Node. Its zero value is the recommendation.
type Options struct {
	Logger *slog.Logger // nil is silent
	// ReadTimeout is how long a read waits for the network. Zero is a minute.
	ReadTimeout time.Duration
	// Hosts is containerd's directory of registry hosts, such as /etc/containerd/certs.d. "" is none.
	Hosts string
	// Keychain has the registries' credentials where no other is given. Nil is docker's configuration and
	// credential helpers.
	Keychain authn.Keychain
	// Unlearned leaves starts unrecorded, and what was learned of others unused.
	Unlearned bool
	// Learned is called after each start that was learned from, by one goroutine per start; ctx ends when the node is closed. Nil is not
	// called.
	Learned func(ctx context.Context, l Lesson)
	// Daemon makes mounts that outlive the process: [Node.Serve] begins to serve them, or goes on where another
	// process was. Only one process at a time can have a root folder so.
	Daemon bool
	// Fill says when the rest of images is fetched for which [Chain.Fill] or [Rootfs.FillBehind] was called.
	Fill FillPolicy
	// Room reports whether the store may grow by what nobody has asked for. Nil is yes; the disk is asked in any case.
	Room func() bool
}

// A Node is one root folder in use by one process. It may be used by several goroutines.
type Node struct {
	root   string
	run    string   // run/PID.N, or mounts if it is a daemon's
	lock   *os.File // run/PID.N/lock, or daemon.lock
	daemon bool
	o      Options
	log    *slog.Logger
	store  *store.Store
	queue  *fetch.Queue
	fills  *fills
	passes passes
	server *serve.Server // nil until the first Mount

	mu      sync.Mutex
	mounts  int // ever made, for names
	sources map[string]remote.Source
	used    map[string]*usedLayer

	sweeping  sync.RWMutex // held exclusively while chains are unmounted
	learning  learning
	following *following
	building  singleflight.Group // of metadata images and their mounts
	unpacking chan struct{}      // holds a token for each layer that is being unpacked
}

// sideBySide is how many layers are unpacked at the same time: a compressed stream may ask for a window of 128 MiB,
// and an image for any number of layers.
const sideBySide = 4

var nodes atomic.Int64 // of this process, ever

// Open opens the root folder, which is made if it is not there. It needs root's rights.
func Open(root string, o Options) (*Node, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	for _, sub := range []string{"images", "run"} {
		if err := os.MkdirAll(filepath.Join(root, sub), 0o700); err != nil {
			return nil, err
		}
	}
	// Containers' users look through the folder at the mounts in it.
	for _, dir := range []string{root, filepath.Join(root, "run")} {
		if err := os.Chmod(dir, 0o711); err != nil {
			return nil, err
		}
	}
	if root, err = realPath(root); err != nil {
		return nil, err
	}
	n := &Node{
		root: root, daemon: o.Daemon, o: o, log: o.Logger, unpacking: make(chan struct{}, sideBySide),
		sources: map[string]remote.Source{}, used: map[string]*usedLayer{},
	}
	n.learning.starts, n.learning.packs = map[string]*start{}, map[string]knownPack{}
	n.following = newFollowing()
	n.learning.ctx, n.learning.cancel = context.WithCancel(context.Background())
	if o.Daemon {
		n.run = filepath.Join(root, "mounts")
		n.lock, err = lockDaemon(root)
	} else {
		n.run = filepath.Join(root, "run", fmt.Sprintf("%d.%d", os.Getpid(), nodes.Add(1)))
		n.sweep()
		n.lock, err = makeRun(n.run)
	}
	if err != nil {
		return nil, err
	}
	if o.Daemon {
		n.sweep()
	}
	if n.store, err = store.Open(filepath.Join(root, "store"), o.Logger); err != nil {
		n.lock.Close()
		return nil, err
	}
	n.queue = fetch.New(n.store, fetch.Options{Logger: o.Logger, ReadTimeout: o.ReadTimeout})
	n.fills = newFills(n.log, n.fillNow)
	return n, nil
}

// makeRun makes a process's own folder, with a lock that says that it lives.
func makeRun(dir string) (*os.File, error) {
	for {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, err
		}
		lock, err := lockRun(dir, os.O_CREATE, unix.LOCK_EX)
		if !errors.Is(err, os.ErrNotExist) {
			return lock, err
		}
		// Another process has swept the folder before it was locked.
	}
}

// lockRun takes the lock of a process's folder, which is held as long as the file is open. The error wraps os.ErrNotExist if
// the folder went away: between open and lock, somebody else may have swept it and it may be there anew.
func lockRun(dir string, flag, how int) (*os.File, error) {
	name := filepath.Join(dir, "lock")
	lock, err := os.OpenFile(name, flag|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(lock.Fd()), how)
	if err == nil {
		var locked, named os.FileInfo
		if locked, err = lock.Stat(); err == nil {
			named, err = os.Stat(name)
		}
		if err == nil && !os.SameFile(locked, named) {
			err = fmt.Errorf("%s: %w", name, os.ErrNotExist)
		}
	}
	if err != nil {
		lock.Close()
		return nil, err
	}
	return lock, nil
}

// sweep removes what processes that were killed left under run/.
func (n *Node) sweep() {
	entries, _ := os.ReadDir(filepath.Join(n.root, "run"))
	for _, e := range entries {
		dir := filepath.Join(n.root, "run", e.Name())
		lock, err := lockRun(dir, 0, unix.LOCK_EX|unix.LOCK_NB)
		if err != nil {
			continue // its process lives, or it is being made, or it is somebody else's
		}
		n.log.Info("removing what a dead process left", "dir", dir)
		if err := removeRun(dir); err != nil {
			n.log.Warn("cannot remove what a dead process left", "dir", dir, "err", err)
		}
		lock.Close()
	}
}

// removeRun unmounts everything below dir, last mounted first, and removes it.
func removeRun(dir string) error {
	points, err := mountPoints()
	if err != nil {
		return err
	}
	for i := len(points) - 1; i >= 0; i-- {
		if strings.HasPrefix(points[i].dir, dir+"/") {
			if err := unmount(points[i].dir); err != nil {
				return fmt.Errorf("unmount %s: %w", points[i].dir, err)
			}
		}
	}
	return os.RemoveAll(dir)
}

// Close ends the node's use. Its images must be closed before, unless it is a daemon's, whose mounts then wait for
// the next one.
func (n *Node) Close() error {
	n.following.close()
	if n.daemon {
		n.learning.cancel()
	}
	n.learning.work.Wait()
	n.learning.cancel()
	var errs []error
	n.fills.close()
	n.passes.close()
	switch {
	case n.daemon && n.server != nil:
		errs = append(errs, n.server.Stop())
	case n.daemon:
	default:
		errs = append(errs, removeRun(n.run))
		if n.server != nil {
			errs = append(errs, n.server.Wait()) // ends when the last overlay that uses it is gone
		}
	}
	errs = append(errs, n.queue.Close(), n.store.Close(), n.lock.Close())
	return errors.Join(errs...)
}

// serve mounts the object server, once.
func (n *Node) serve() (dir string, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	dir = n.serverDir()
	if n.server != nil {
		return dir, nil
	}
	if n.daemon {
		return "", errors.New("the daemon does not serve yet")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	n.server, err = serve.Mount(dir, n.queue, n.log)
	return dir, err
}

// MountOptions configures one mount. Its zero value is the recommendation.
type MountOptions struct {
	// Record writes down what is read, for [Rootfs.Recorded]: every read comes through the object server then.
	Record bool
	// RW adds a writable layer, which is thrown away at Close.
	RW bool
	// Platform chooses from an index. Nil is this machine's.
	Platform *v1.Platform
	// Keychain has the registries' credentials. Nil is docker's configuration and credential helpers.
	Keychain authn.Keychain
	// Notice is called with a line for the user, such as that a layer is not lazy. Nil drops it. It may be called from
	// several goroutines at once, as Progress may.
	Notice func(line string)
	// Progress is called while layers are fetched whole, with the bytes that came. Nil drops it.
	Progress func(bytes int64)
}

func (o *MountOptions) notice(line string) {
	if o.Notice != nil {
		o.Notice(line)
	}
}

func (o *MountOptions) fetched(n int64) {
	if o.Progress != nil {
		o.Progress(n)
	}
}

// A Rootfs is one image, mounted.
type Rootfs struct {
	// Dir is where, without symbolic links.
	Dir string
	// Image is what the reference named when it was resolved.
	Image *remote.Image
	// Config is the image's, verified.
	Config *v1.ConfigFile
	// Resolved, Parsed and Mounted are when the manifest was here, when the tables of contents were, and when the rootfs was usable.
	Resolved, Parsed, Mounted time.Time

	n      *Node
	src    remote.Source
	dir    string // run/PID.N/M: upper, work, and mount points
	layers []*layer
	queued []*fetch.Layer
	record Record

	startup  *Startup             // nil if none is of use
	over     func()               // ends the recording of the start; nil if there is none
	recorded func() []fetch.Touch // nil without a recording

	// Of one that was adopted:
	release func()
	shared  bool // src is the node's
}

// Mount mounts the image that ref names at dir, an empty directory; "" mounts it at one of the node's own,
// which goes away at Close. If it returns an error, nothing is mounted and dir is as it was.
func (n *Node) Mount(ctx context.Context, ref remote.Reference, dir string, o MountOptions) (*Rootfs, error) {
	if dir != "" {
		if err := checkEmpty(dir); err != nil {
			return nil, err
		}
	}
	release, err := n.holdImages(unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	defer release()
	n.queue.Touch() // a start wants the link
	r := &Rootfs{n: n}
	if err := r.mount(ctx, ref, dir, o); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// checkEmpty refuses to hide files under a mount.
func checkEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%s does not exist: make it first (mkdir -p %s)", dir, dir)
	case err != nil:
		return err
	case len(entries) > 0:
		return fmt.Errorf("%s is not empty: choose an empty directory, a mount would hide what is in it", dir)
	}
	return nil
}

func (r *Rootfs) mount(ctx context.Context, ref remote.Reference, dir string, o MountOptions) (err error) {
	n := r.n
	// The object server needs nothing from the network; it comes up while the registry thinks.
	var server string
	serving := make(chan error, 1)
	go func() {
		var err error
		server, err = n.serve()
		serving <- err
	}()
	metaImage, err := r.resolve(ctx, ref, o)
	if serveErr := <-serving; err == nil {
		err = serveErr
	}
	if err != nil {
		return err
	}
	if err := r.makeDirs(dir); err != nil {
		return err
	}
	r.record.Dir = r.Dir
	if err := n.writeRecord(&r.record, r.dir); err != nil {
		return err
	}
	metaDir := filepath.Join(r.dir, "meta")
	if err := mountEROFS(metaImage, metaDir); err != nil {
		return err
	}
	parts := overlay{meta: metaDir, objects: n.store.Objects(), server: server}
	if o.Record {
		parts.objects = filepath.Join(r.dir, "empty")
		r.recorded = n.queue.Record(r.queued...).Stop
	}
	if o.RW {
		parts.upper, parts.work = filepath.Join(r.dir, "upper"), filepath.Join(r.dir, "work")
		err = likeRoot(parts.upper, metaDir)
	}
	if err == nil {
		err = mountOverlay(parts, r.Dir)
	}
	if err == nil && !o.Record {
		line := commandOf(r.Config)
		r.over = r.Chain().learn(ref.At(r.Image.Digest), r.Image.Digest, r.queued, func(context.Context) ([]string, error) { return line, nil })
	}
	// The overlay has the metadata image now; nobody else needs to see it.
	if detachErr := unix.Unmount(metaDir, unix.MNT_DETACH); err == nil {
		err = detachErr
	}
	if err != nil {
		return err
	}
	r.Mounted = time.Now()
	return nil
}

// makeDirs makes the mount's own folders, with the modes that the root of a file system has.
func (r *Rootfs) makeDirs(dir string) error {
	n := r.n
	var err error
	if r.dir, err = n.newDir(); err != nil {
		return err
	}
	for _, sub := range []string{"meta", "upper", "work", "rootfs", "empty"} {
		if err := os.MkdirAll(filepath.Join(r.dir, sub), 0o755); err != nil {
			return err
		}
	}
	if dir == "" {
		r.Dir = filepath.Join(r.dir, "rootfs")
		return nil
	}
	r.Dir, err = realPath(dir)
	return err
}

// newDir makes a folder for a mount.
func (n *Node) newDir() (string, error) {
	if err := os.MkdirAll(n.run, 0o711); err != nil {
		return "", err
	}
	for {
		n.mu.Lock()
		n.mounts++
		dir := filepath.Join(n.run, fmt.Sprint(n.mounts))
		n.mu.Unlock()
		err := os.Mkdir(dir, 0o711)
		if err == nil || !n.daemon || !errors.Is(err, os.ErrExist) { // of a daemon that was here before
			return dir, err
		}
	}
}

// realPath is the absolute path of dir without symbolic links, which is what mountinfo calls it.
func realPath(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(dir)
}

// resolve gets the image's manifest, config and tables of contents, all layers side by side, and
// returns the path of the metadata image.
func (r *Rootfs) resolve(ctx context.Context, ref remote.Reference, o MountOptions) (string, error) {
	n := r.n
	var err error
	if r.src, err = remote.Open(ctx, ref, n.remoteOptions(o.Keychain)); err != nil {
		return "", err
	}
	begun := time.Now()
	if r.Image, err = remote.Pick(ctx, r.src, o.Platform); err != nil {
		return "", err
	}
	r.Resolved = time.Now()
	for _, l := range r.Image.Layers {
		x, err := newLayer(l, v1.Hash{})
		if err != nil {
			return "", fmt.Errorf("%v: %w", ref, err)
		}
		r.layers = append(r.layers, x)
	}
	var tocs []*toc.TOC // stays nil if nothing has to be made of them
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(maxTables)
	// A metadata image that is here needs no tables of contents, only the layers' chunk tables.
	known := r.known()
	if !known && !o.Record {
		r.startup = n.startupOf(r.src, ref, r.Image, r.Resolved.Sub(begun))
	}
	group.Go(func() error { return r.readConfig(gctx) })
	if !known {
		tocs = make([]*toc.TOC, len(r.layers))
		for i, l := range r.layers {
			group.Go(func() (err error) {
				tocs[i], err = l.open(gctx, n, &o, r.startup)
				return err
			})
		}
	}
	if err := group.Wait(); err != nil {
		return "", fmt.Errorf("%v: %w", ref, err)
	}
	for i, l := range r.layers {
		l.diffID = r.Config.RootFS.DiffIDs[i]
		if tocs == nil {
			continue
		}
		if t := tocs[i]; t.Compression == toc.Whole && t.Digest.String() != l.diffID.String() {
			return "", fmt.Errorf("%v: %s: its tar's digest is %v, but the image's config says %v", ref, l.name(), t.Digest, l.diffID)
		}
	}
	r.Parsed = time.Now()
	image, err := r.build(ref, tocs, &o)
	if err != nil {
		return "", fmt.Errorf("%v: %w", ref, err)
	}
	if r.startup != nil {
		own := make(chan *Learned, 1)
		if tocs != nil { // else the image was here before
			if l := n.learned(repositoryOf(ref), commandOf(r.Config)); l != nil {
				own <- l
			}
		}
		close(own)
		r.startup.chain = r.chain()
		r.startup.behind(own, r.queued, tocs)
	}
	return image, nil
}

// maxTables is how many tables of contents are fetched and parsed at once: more than most images have layers.
const maxTables = 32

func (r *Rootfs) readConfig(ctx context.Context) error {
	var config *v1.ConfigFile
	err := errNoTable
	digest, _ := toc.ParseDigest(r.Image.Manifest.Config.Digest.String())
	if raw := r.startup.table(ctx, digest); raw != nil {
		config, err = r.Image.ParseConfig(raw)
	}
	if err != nil {
		config, _, err = r.Image.Config(ctx)
	}
	if err != nil {
		return err
	}
	if got, want := len(config.RootFS.DiffIDs), len(r.layers); got != want {
		return fmt.Errorf("the config has %d diffIDs for %d layers", got, want)
	}
	r.Config = config
	return nil
}

func (r *Rootfs) chain() string { return chain(r.layers) }

// chain names the metadata image of layers, the lowest first. It is made of what the layers' tables of contents were verified
// against, not of diffIDs, which are only claimed.
func chain(layers []*layer) string {
	h := sha256.New()
	fmt.Fprintln(h, meta.Version)
	for _, l := range layers {
		fmt.Fprintln(h, l.id)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// known reports whether the store has everything that a mount of the image needs, bytes of files aside.
func (r *Rootfs) known() bool {
	if _, err := os.Stat(r.metaImage()); err != nil {
		return false
	}
	for _, l := range r.layers {
		if !l.openTable(r.n) {
			return false
		}
	}
	return true
}

// metaImage is where the metadata image of the layers lies in the store.
func (r *Rootfs) metaImage() string { return r.n.store.Path("meta", r.chain()+".erofs") }

// build makes the metadata image and the chunk tables, unless they are known, and gives the layers to the fetcher.
func (r *Rootfs) build(ref remote.Reference, tocs []*toc.TOC, o *MountOptions) (string, error) {
	n := r.n
	path := r.metaImage()
	if tocs != nil {
		var group errgroup.Group
		group.Go(func() error { return n.buildMeta(r.layers, tocs, path) })
		for i, l := range r.layers {
			group.Go(func() error {
				if l.openTable(n) {
					return nil
				}
				return l.makeTable(n, tocs[i])
			})
		}
		if err := group.Wait(); err != nil {
			return "", err
		}
	}
	for _, l := range r.layers {
		s := l.source(n, o)
		if err := n.queue.Add(s); err != nil {
			return "", err
		}
		r.queued = append(r.queued, s)
	}
	r.record = Record{
		Reference: ref.String(), Digest: r.Image.Digest.String(), Chain: r.chain(), Used: time.Now().UTC(),
	}
	pinned := ref.At(r.Image.Digest)
	for _, l := range r.layers {
		r.record.Layers = append(r.record.Layers, l.record(pinned))
	}
	return path, nil
}

// buildMeta writes the metadata image of layers to path, in the store.
func (n *Node) buildMeta(layers []*layer, tocs []*toc.TOC, path string) error {
	err := n.store.WriteFile(func(f *os.File) error { _, err := meta.Build(f, tocs); return err }, "meta", filepath.Base(path))
	if e := (*meta.LayerError)(nil); errors.As(err, &e) {
		err = fmt.Errorf("%s: %w", layers[e.Layer].name(), e.Err)
	}
	return err
}

// Fill fetches everything of the image that is not here.
func (r *Rootfs) Fill(ctx context.Context) error { return r.n.queue.Fill(ctx, r.queued...) }

// Stats says what the network was asked for: by the registry's client since the mount began, and by the node's fetcher as a whole.
func (r *Rootfs) Stats() (remote.Stats, fetch.Stats) {
	return r.src.Stats(), r.n.queue.Stats()
}

// Wait returns when the rootfs is not mounted any more, whoever unmounted it, or when ctx ends.
func (r *Rootfs) Wait(ctx context.Context) error {
	// Linux marks mountinfo as having urgent data when a mount comes or goes: proc_pid_mountinfo(5).
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	for changed := true; ; {
		if changed {
			mounted, err := isMounted(r.Dir)
			if err != nil || !mounted {
				return err
			}
		}
		poll := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}
		n, err := unix.Poll(poll, 200)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		changed = n > 0
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// isMounted reports whether a rootfs is mounted at dir.
func isMounted(dir string) (bool, error) {
	points, err := mountPoints()
	for _, p := range points {
		if p.dir == dir && p.fstype == "overlay" && p.source == mountSource {
			return true, err
		}
	}
	return false, err
}

// Close unmounts the image. Programs that still use it keep what they have open, and get errors for what is not here.
func (r *Rootfs) Close() error {
	var errs []error
	if r.Dir != "" {
		if mounted, _ := isMounted(r.Dir); mounted {
			errs = append(errs, unmount(r.Dir))
		}
	}
	if r.dir != "" {
		errs = append(errs, removeRun(r.dir))
	}
	if r.startup != nil {
		r.startup.Close()
	}
	if r.over != nil {
		r.over()
	}
	for _, l := range r.queued {
		r.n.queue.Remove(l)
	}
	r.queued = nil
	if r.release != nil {
		r.release()
	}
	if r.src != nil && !r.shared {
		errs = append(errs, r.src.Close())
	}
	return errors.Join(errs...)
}

// Unmount unmounts the rootfs at dir, whichever process mounted it with the root folder root, and returns when that one has let go of the
// image, or after some seconds. A root of "" does not wait.
func Unmount(root, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	mounted, err := isMounted(dir)
	if err != nil {
		return err
	}
	if !mounted {
		return fmt.Errorf("%s is not an image that lazuli mounted", dir)
	}
	err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s is in use: end the programs that work in it (fuser -vm %s) and try again", dir, dir)
	}
	for waited := time.Duration(0); err == nil && root != "" && waited < 5*time.Second && recorded(root, dir); waited += 20 * time.Millisecond {
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

// recorded reports whether a record says that something is mounted at dir.
func recorded(root, dir string) bool {
	for _, pattern := range []string{"run/*/*/*.json", "mounts/*/*.json"} {
		records, _ := readRecords(filepath.Join(root, pattern))
		if slices.ContainsFunc(records, func(r Record) bool { return r.Dir == dir }) {
			return true
		}
	}
	return false
}
